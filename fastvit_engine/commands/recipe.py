"""The arguments that name a recipe and change it, shared by the commands that take one."""

import argparse


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a name from `fastvit config list`, or a YAML file")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override one value: --set train.precision=fp32"
    )
