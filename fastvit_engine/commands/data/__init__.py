"""The `fastvit data` commands, a file each. Heavy packages are imported only when a command begins its work."""

import argparse

from fastvit_engine.commands.data import bench, index, label, make, show, stats, verify
from fastvit_engine.commands.data.options import wrapped


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    data = commands.add_parser(
        "data",
        help=purpose,
        description=wrapped("Make WebDataset shards, index and verify them, and see what is in them."),
        epilog="example:\n  fastvit data make photos/ --out data/photos\n  fastvit data verify data/photos",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action in (make, index, verify, stats, show, label, bench):
        action.add(actions)
