"""`fastvit evaluate`: accuracy and loss of trained models on labelled images."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from fastvit_engine.commands.model import MODEL_HELP, add_model_options, check_output_folder, load
from fastvit_engine.commands.parser import local_path, path_or_url, positive
from fastvit_engine.errors import UserError
from fastvit_engine.shown import say

if TYPE_CHECKING:
    from pathlib import Path

    from fastvit_engine.config import Resolved
    from fastvit_engine.evaluate.confusion import Confusion

_LOWEST = 5  # classes that are shown


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "evaluate",
        help=purpose,
        description="Measures top-1 and top-5 accuracy and the loss of a model on every image of some shards, each\n"
        "counted once, resized and cropped as in the model's run. With several models, such as those of several\n"
        "seeds, also their mean and standard deviation (of the population).",
        epilog="examples:\n  fastvit evaluate runs/b16 --data data/imagenet --out eval-b16\n"
        "  fastvit evaluate runs/seed0 runs/seed1 runs/seed2 --data data/imagenet --real real.json --json\n"
        "  fastvit evaluate b16.safetensors --data data/imagenet-r --classes imagenet-r.txt --labels list",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", type=path_or_url, help=MODEL_HELP)
    parser.add_argument("--data", metavar="SHARDS", required=True, help="a folder (its evaluation shards), a shard, a "
                        "glob or a URL")  # fmt: skip
    parser.add_argument("--real", metavar="FILE.json", type=local_path, help="also measure with several right "
                        "classes per image: a list of lists in the order of the images (ImageNet's by the number in "
                        "their keys); images whose list is empty are left out")  # fmt: skip
    parser.add_argument("--classes", metavar="LIST", help="the model's outputs that count, as for ImageNet-R: numbers "
                        "or names separated by commas, or a file: one per line, or a JSON list, whose entries may be "
                        "lists of several outputs")  # fmt: skip
    parser.add_argument("--labels", choices=("model", "list"), help="with --classes, what a label counts: the model's "
                        "outputs (images of other classes are left out), or the entries of the list (default: by the "
                        "number of classes in dataset.json)")  # fmt: skip
    parser.add_argument("--ignore-names", action="store_true", help="evaluate although the classes of model and data "
                        "have different names")  # fmt: skip
    parser.add_argument("--limit", metavar="N", type=positive, help="only the first N samples")
    parser.add_argument("--out", metavar="DIR", type=local_path, help="also write per_class.csv (images, shares right, "
                        "and what each class is taken for most) and confusion.png (rows: right class, columns: "
                        "answer, darker: more)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.out is not None and len(args.models) > 1:
        raise UserError(f"--out takes the table of one model, and there are {len(args.models)}: evaluate one at a time")
    if args.real is not None and args.classes is not None:
        raise UserError("--real and --classes say differently which classes are right: leave one of them out")
    if args.labels is not None and args.classes is None:
        raise UserError("--labels says what the labels count among --classes: add them, or leave it out")
    if args.out is not None:
        check_output_folder(args.out)
    from fastvit_engine.config import load_config

    resolved = load_config(args.recipe, args.set)

    import numpy as np

    found: list[dict[str, Any]] = []
    lines: list[str] = []
    for source in args.models:
        figures, lines = _evaluate(source, resolved, args)
        found.append(figures)
    if len(found) == 1:
        print(json.dumps(found[0])) if args.json else say("\n".join([_line(found[0]), *lines]))
        return 0
    measured = [name for name, value in found[0].items() if isinstance(value, float)]
    every = {name: [figures[name] for figures in found] for name in measured}
    mean = {name: float(np.mean(values)) for name, values in every.items()}
    std = {name: float(np.std(values)) for name, values in every.items()}
    if args.json:
        models = [{"model": source, **figures} for source, figures in zip(args.models, found, strict=True)]
        print(json.dumps({"models": models, "mean": mean, "std": std}))
        return 0
    for source, figures in zip(args.models, found, strict=True):
        say(f"{source}: {_line(figures)}")
    say(f"mean of {len(found)}: {_line(mean)}\nstandard deviation: {_line(std)}")
    return 0


def _evaluate(source: str, resolved: "Resolved", args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The figures of one model, as --json gives them, and lines about its weakest classes."""
    from fastvit_engine.evaluate.class_lists import check_names, match_images, read_classes, read_real, right_outputs
    from fastvit_engine.evaluate.confusion import Confusion
    from fastvit_engine.evaluate.one_pass import OnePass, config_for
    from fastvit_engine.evaluate.record import Right, figures_of, real_accuracy, record_answers
    from fastvit_engine.observe.progress import WorkProgress

    model = load(source, args)
    outputs, names = model.config.num_classes, model.class_names
    if outputs < 1:
        raise UserError(f"{source} has no head, so it names no class: use `fastvit fewshot` on its features")
    shards = OnePass.over(args.data, "eval", config_for(model, resolved), named="--data", limit=args.limit)
    data_names = None if shards.info is None else shards.info.classes
    right, notes = Right.all(outputs), list(shards.notes)
    if args.classes is not None:
        groups = read_classes(args.classes, names, outputs)
        data_classes = None if data_names is None else len(data_names)
        right, note = right_outputs(groups, outputs, data_classes, args.labels)
        notes.append(note)
    elif not args.ignore_names:
        check_names(names, data_names)
    if args.classes is None and data_names is not None and len(data_names) < outputs:
        notes.append(
            f"the model has {outputs:,} outputs and the data {len(data_names):,} classes: an answer of the other "
            "outputs is wrong; --classes says which count"
        )
    lists = None if args.real is None else read_real(args.real, outputs)
    batches = shards.batches(args.batch_size, doing="evaluating", progress=WorkProgress())
    record = record_answers(model, batches, right, resolved.config.loss.kind)
    figures: dict[str, Any] = figures_of(record)._asdict()
    if lists is not None:
        total = None if args.limit is not None else shards.seen
        figures["real"], labelled = real_accuracy(
            record, lists, match_images(len(lists), record.keys, record.positions, total)
        )
        notes.append(f"--real has labels for {labelled:,} of {len(record.keys):,} images")
    elif figures["samples"] < len(record.keys):
        left_out = len(record.keys) - figures["samples"]
        notes.append(f"left out: {left_out:,} of {len(record.keys):,} images, of classes that do not count")
    for note in notes:
        say(f"note: {note}", file=sys.stderr)
    if args.classes is None and names is None:
        names = None if data_names is None else tuple(data_names)
    confusion = Confusion(record.right, record.ranked)
    if args.out is not None:
        _write(confusion, names, args.out)
    return figures, [] if args.json else _weakest(confusion, names)


def _write(confusion: "Confusion", names: "tuple[str, ...] | None", out: "Path") -> None:
    """Writes the table and the picture. Raises UserError if that cannot be."""
    from fastvit_engine.data.check.contact_sheet import save_sheet
    from fastvit_engine.files import atomic_write

    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / "per_class.csv", confusion.csv(names))
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): choose another --out") from error
    save_sheet(confusion.picture(names), out / "confusion.png", option="--out")
    say(f"{out}: per_class.csv, confusion.png", file=sys.stderr)


def _weakest(confusion: "Confusion", names: "tuple[str, ...] | None") -> list[str]:
    """The classes with the lowest accuracy, if any is below 1."""
    rows = sorted((row for row in confusion.table(names) if row.top1 < 1), key=lambda row: row.top1)
    lines = [
        f"  {row.name}: {100 * row.top1:.1f} % of {row.samples:,}, {row.times:,} x taken for {row.taken_for}"
        for row in rows[:_LOWEST]
    ]
    return ["weakest classes:", *lines] if lines else []


def _line(figures: dict[str, Any]) -> str:
    shares = [
        f"{word} {100 * figures[name]:.2f} %"
        for name, word in (("top1", "top-1"), ("top5", "top-5"), ("real", "real"))
        if figures.get(name) is not None
    ]
    images = f"  ({figures['samples']:,} images)" if "samples" in figures else ""
    return f"{'  '.join(shares)}  loss {figures['loss']:.4f}{images}"
