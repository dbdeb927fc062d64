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
    _add_bench(actions)


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
    from fastvit_engine.data.shards import list_shards
    from fastvit_engine.errors import UserError

    if args.out.suffix != INDEX_SUFFIX:
        raise UserError(f"--out is {args.out}: let its name end in {INDEX_SUFFIX}, by which training knows an index")
    if args.processes is not None and args.processes < 1:
        raise UserError(f"--processes is {args.processes}: at least 1")
    shards = list_shards(args.shards, named="SHARDS")
    index = write_index(shards, args.out, label_key=args.label_key, processes=args.processes, progress=print)
    classes = index.class_counts()
    unlabelled = int(index.unlabelled.sum())
    labels = f"{len(classes):,} classes" + (f", {unlabelled:,} without a label" if unlabelled else "")
    print(f"{args.out}: {index.samples:,} samples in {len(shards):,} shards, {labels}, hash {index.hash}")
    return 0


def _add_bench(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    bench = actions.add_parser(
        "bench",
        help="measure reading, decoding and augmenting, beside other ways to do it",
        description="Measures how many training images a CPU-second gives, stage by stage and as whole loaders: this\n"
        "engine, WebDataset with the usual transforms, WebDataset with fast ones, and timm. Takes the first 256 MB of\n"
        "the shards and writes nothing beside them.",
        epilog="example:\n  fastvit data bench shards/photos --repack 256 --out bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("shards", metavar="SHARDS", help="a folder, a glob or a brace pattern")
    bench.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="of the crops (default 224)")
    bench.add_argument("--workers", type=int, default=2, metavar="N", help="processes of each loader (default 2)")
    bench.add_argument("--rounds", type=int, metavar="N", help="how often everything is measured (default 9)")
    bench.add_argument("--repack", type=int, metavar="PIXELS", help="measure on the images with this short side too")
    bench.add_argument("--out", type=Path, metavar="DIR", help="write data_bench.md, .json and .png there")
    bench.add_argument("--quick", action="store_true", help="two short rounds, for a first impression")
    bench.add_argument("--json", action="store_true", help="print the figures as JSON")
    bench.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    import json
    import sys

    from fastvit_engine.data.bench.run import FULL, QUICK, bench
    from fastvit_engine.errors import UserError

    for name in ("image_size", "workers", "rounds", "repack"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: at least 1")
    effort = QUICK if args.quick else FULL
    text, record = bench(
        args.shards,
        image_size=args.image_size,
        workers=args.workers,
        effort=effort._replace(rounds=args.rounds or effort.rounds),
        repack=args.repack,
        out=args.out,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(record) if args.json else text, end="\n" if args.json else "")
    return 0
