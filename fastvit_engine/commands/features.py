"""`fastvit features`: what a model's head sees of images, as an .npz file."""

import argparse

from fastvit_engine.commands.model import MODEL_HELP, add_model_options, check_output, load
from fastvit_engine.commands.parser import local_path, path_or_url, positive
from fastvit_engine.shown import say


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "features",
        help=purpose,
        description="Writes the representation of every image of some shards: what the model's head sees, pooled, and\n"
        "after the tanh layer if there is one. The file has the arrays features (float32 [N, R]), labels (int64 [N])\n"
        "and keys ([N]), one row per image in the order of the shards; images that cannot be decoded are left out.",
        epilog="example:\n  fastvit features runs/b16 --data data/photos --split train --out photos-train.npz",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=path_or_url, help=MODEL_HELP)
    parser.add_argument("--data", metavar="SHARDS", required=True, help="a folder, a shard, a glob or a URL")
    parser.add_argument("--out", metavar="F.npz", type=local_path, required=True, help="the file to write")
    parser.add_argument(
        "--split",
        choices=("train", "eval"),
        default="eval",
        help="which shards of a folder that has both (default: eval)",
    )
    parser.add_argument("--limit", metavar="N", type=positive, help="only the first N samples")
    add_model_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.commands.settings import load_settings

    check_output(args.out, "--out", (args.model, args.data))
    resolved = load_settings(args)

    from fastvit_engine.evaluate.features import check_features, extract_features, save_features
    from fastvit_engine.evaluate.one_pass import OnePass, config_for
    from fastvit_engine.observe.progress import WorkProgress
    from fastvit_engine.observe.units import counted

    model = load(args.model, args)
    config = config_for(model, resolved)
    shards = OnePass.over(args.data, args.split, config, named="--data", limit=args.limit)
    batches = shards.batches(args.batch_size, doing="features of", progress=WorkProgress())
    found = extract_features(model, batches)
    check_features(found, args.model)
    save_features(args.out, found)
    notes = "".join(f"; {note}" for note in shards.notes)
    say(f"{args.out}: {counted(len(found.labels), 'image')}, {found.features.shape[1]:,} features each{notes}")
    return 0
