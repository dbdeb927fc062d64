"""The arguments that name a recipe and change it, shared by the commands that take one."""

import argparse

from fastvit_engine.commands.parser import setting


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a name from `fastvit config list`, or a YAML file")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        type=setting,
        action="append",
        default=[],
        help="override one value: --set train.precision=fp32",
    )
