"""The `fastvit data` commands."""

import argparse
from pathlib import Path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    data = commands.add_parser(
        "data", help="make and index WebDataset shards", description="Make and index WebDataset shards."
    )
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = actions.add_parser(
        "make",
        help="write a folder of images, or scikit-learn's digits, as shards",
        description="Write a folder of images, or scikit-learn's digits, as shuffled WebDataset shards with a held-out "
        "evaluation split. Running it again does nothing; a run that was stopped starts over.",
        epilog="example:\n  fastvit data make photos/ --out shards/photos --eval-fraction 0.05\n\n"
        "photos/ holds one sub-folder of JPEG, PNG or WebP images a class.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    make.add_argument("source", metavar="SOURCE", help="a folder with one sub-folder a class, or 'digits'")
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the shards")
    make.add_argument("--eval-fraction", type=float, default=0.1, help="share of each class held out (default 0.1)")
    make.add_argument("--samples-per-shard", type=int, default=1000, help="at most this many (default 1000)")
    make.add_argument("--seed", type=int, default=0, help="of the split and the order (default 0)")
    make.set_defaults(run=_make)
    _add_index(actions)


def _make(args: argparse.Namespace) -> int:
    from fastvit_engine.data.make import make_dataset

    make_dataset(
        args.source,
        args.out,
        eval_fraction=args.eval_fraction,
        samples_per_shard=args.samples_per_shard,
        seed=args.seed,
    )
    return 0


def _add_index(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    index = actions.add_parser(
        "index",
        help="write the index of shards, which checks them too",
        description="Reads the headers of plain tar shards and writes where each sample begins, which training needs\n"
        "to read them in an exact order. Damaged shards are named with the byte. Shards that have not changed since\n"
        "the last time are not read again. Remote shards (s3://, https://, ...) are read through fsspec.",
        epilog="example:\n  fastvit data index 'shards/train-*.tar' --out shards/shards.index\n\n"
        "Training finds shards.index beside the shards; any other name goes into data.index.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    index.add_argument("shards", metavar="SHARDS", nargs="+", help="folders, globs, brace patterns or URLs")
    index.add_argument("--out", type=Path, required=True, metavar="FILE", help="the index to write or bring up to date")
    index.add_argument("--label-key", default="cls", help="member, or json.FIELD, with the label (default cls)")
    index.add_argument("--processes", type=int, metavar="N", help="read so many shards at once (default: one a core)")
    index.set_defaults(run=_index)


def _index(args: argparse.Namespace) -> int:
    from fastvit_engine.data.index import INDEX_SUFFIX, write_index
    from fastvit_engine.data.shards import find_shards
    from fastvit_engine.errors import UserError

    if args.out.suffix != INDEX_SUFFIX:
        raise UserError(f"--out is {args.out}: let its name end in {INDEX_SUFFIX}, by which training knows an index")
    if args.processes is not None and args.processes < 1:
        raise UserError(f"--processes is {args.processes}: at least 1")
    shards = sorted({shard for pattern in args.shards for shard in find_shards(pattern, None)})
    index = write_index(shards, args.out, label_key=args.label_key, processes=args.processes, progress=print)
    classes = index.class_counts()
    unlabelled = int(index.unlabelled.sum())
    labels = f"{len(classes):,} classes" + (f", {unlabelled:,} without a label" if unlabelled else "")
    print(f"{args.out}: {index.samples:,} samples in {len(shards):,} shards, {labels}, hash {index.hash}")
    return 0
