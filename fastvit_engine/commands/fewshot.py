"""`fastvit fewshot`: how well a linear classifier does on a model's features, from a few images of each class."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastvit_engine.commands.model import MODEL_HELP, add_model_options, check_output, given_model_options, load
from fastvit_engine.commands.parser import local_path, path_or_url, positive
from fastvit_engine.errors import UserError
from fastvit_engine.shown import say

if TYPE_CHECKING:
    from fastvit_engine.config import Resolved
    from fastvit_engine.evaluate.features import Features
    from fastvit_engine.observe.metrics import ShotFigures
    from fastvit_engine.observe.progress import WorkProgress


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "fewshot",
        help=purpose,
        description="Fits a linear classifier in closed form (regularised least squares, in float64) to the\n"
        "features of a few training images per class, and measures it on the evaluation images: the few-shot accuracy\n"
        "of the ViT paper. Each number of shots is repeated with different images; the mean and the standard\n"
        "deviation (of the population) over these seeds are printed.",
        epilog="examples:\n  fastvit fewshot runs/b16 --train data/photos --eval data/photos\n"
        "  fastvit fewshot --features train.npz eval.npz --shots 5 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", type=path_or_url, help=MODEL_HELP)
    parser.add_argument("--train", metavar="SHARDS", help="shards whose images the classifiers are fitted to")
    parser.add_argument("--eval", metavar="SHARDS", help="shards whose images they are measured on")
    parser.add_argument("--features", metavar="F.npz", type=local_path, nargs="+",
                        help="in place of a model and shards: the features of both, two files of `fastvit features`, "
                        "or one of --features-out")  # fmt: skip
    parser.add_argument("--features-out", metavar="F.npz", type=local_path,
                        help="also write the features: train_x, train_y, train_keys, and the same of eval")  # fmt: skip
    parser.add_argument("--shots", metavar="N", type=positive, nargs="+", default=[1, 5, 10, 25],
                        help="images per class (default: 1 5 10 25)")  # fmt: skip
    parser.add_argument("--seeds", metavar="N", type=positive, default=3, help="repetitions of each (default: 3)")
    parser.add_argument("--l2", metavar="X", type=float, default=1024.0,
                        help="strength of the regularisation (default: 1024)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    _check(args)
    from fastvit_engine.commands.settings import load_settings

    resolved = load_settings(args)  # before PyTorch is loaded: a typing error is told at once

    from fastvit_engine.evaluate.features import check_features, load_both, load_features, save_both
    from fastvit_engine.evaluate.fewshot import classes_of, few_shot_accuracy, shortages, summarize, tasks
    from fastvit_engine.observe.progress import WorkProgress

    progress = WorkProgress()
    if args.features is None:
        train, evaluation = _extract(args, resolved, progress)
    elif len(args.features) == 1:
        train, evaluation = load_both(args.features[0])
    else:
        train, evaluation = (load_features(path) for path in args.features)
        _check_widths(train, evaluation, args.features)
    sources = args.features or [args.model]
    check_features(train, sources[0])
    check_features(evaluation, sources[-1])
    if args.features_out is not None:
        save_both(args.features_out, train, evaluation)
    shots = sorted(set(args.shots))
    for sentence in shortages(train.labels, evaluation.labels, shots):
        say(f"note: {sentence}", file=sys.stderr)
    wanted = tasks(shots, args.seeds)
    progress.start("fitting", len(wanted), "classifiers")
    accuracies, num_classes = [], classes_of(train.labels, evaluation.labels)
    for task in wanted:
        accuracies.append(
            few_shot_accuracy(
                train.features,
                train.labels,
                evaluation.features,
                evaluation.labels,
                shots=task.shots,
                num_classes=num_classes,
                seed=task.seed,
                l2=args.l2,
            )
        )
        progress.update(len(accuracies))
    progress.clear()
    figures = summarize(zip(wanted, accuracies, strict=True))
    if args.json:
        print(json.dumps({"shots": figures, "l2": args.l2}))
    else:
        say(_table(figures, len(evaluation.labels)))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises UserError unless there is one source of features."""
    if not 0 < args.l2 < float("inf"):
        raise UserError(f"--l2 is {args.l2:g}: give a number above 0, such as 1024")
    if args.features_out is not None:
        inputs = (args.model, args.train, args.eval, *(args.features or ()))
        check_output(args.features_out, "--features-out", inputs)
    if args.features is None:
        missing = [name for name in ("model", "train", "eval") if getattr(args, name) is None]
        if missing:
            named = "MODEL" if missing[0] == "model" else f"--{missing[0]} SHARDS"
            raise UserError(
                f"{named} is missing: give MODEL --train SHARDS --eval SHARDS, or --features TRAIN.npz EVAL.npz"
            )
        return
    given = [name for name in ("model", "train", "eval") if getattr(args, name) is not None]
    if given:
        named = "MODEL" if given[0] == "model" else f"--{given[0]}"
        raise UserError(f"--features takes the place of {named}: leave one of them out")
    if unused := given_model_options(args):
        raise UserError(f"{unused[0]} is for a model, and --features are computed already: leave one of them out")
    if len(args.features) > 2:
        raise UserError(f"--features has {len(args.features)} files: give two, of the training and evaluation images")


def _extract(args: argparse.Namespace, resolved: "Resolved", progress: "WorkProgress") -> "tuple[Features, Features]":
    """The features of both sets by the model. Raises UserError."""
    from fastvit_engine.data.shards.names import check_same_classes
    from fastvit_engine.evaluate.features import extract_features
    from fastvit_engine.evaluate.one_pass import OnePass, config_for

    model = load(args.model, args)
    config = config_for(model, resolved)
    train = OnePass.over(args.train, "train", config, named="--train")
    evaluation = OnePass.over(args.eval, "eval", config, named="--eval")
    check_same_classes(train.info, evaluation.info, "--train", "--eval")
    both = set(train.shards.shards) & set(evaluation.shards.shards)
    overlap = [f"{len(both):,} of the shards of --eval are in --train too: the figures flatter"] if both else []
    for note in (*train.notes, *evaluation.notes, *overlap):
        say(f"note: {note}", file=sys.stderr)
    return (
        extract_features(model, train.batches(args.batch_size, doing="features of training", progress=progress)),
        extract_features(model, evaluation.batches(args.batch_size, doing="features of evaluation", progress=progress)),
    )


def _check_widths(train: "Features", evaluation: "Features", paths: list[Path]) -> None:
    widths = [part.features.shape[1] for part in (train, evaluation)]
    if widths[0] != widths[1]:
        raise UserError(
            f"{paths[0]} has {widths[0]:,} features per image and {paths[1]} has {widths[1]:,}: make both with one "
            "model"
        )


def _table(figures: "dict[str, ShotFigures]", samples: int) -> str:
    lines = [f"accuracy on {samples:,} images, mean and standard deviation over the seeds:"]
    for shots, found in figures.items():
        each = ", ".join(f"{100 * accuracy:.1f}" for accuracy in found["seeds"])
        lines.append(f"{shots:>6}-shot  {100 * found['mean']:5.1f} % ± {100 * found['std']:.1f}  ({each})")
    return "\n".join(lines)
