"""The `fastvit data` commands."""

import argparse
from pathlib import Path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    data = commands.add_parser("data", help="make WebDataset shards", description="Make WebDataset shards.")
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
