"""`fastvit config`."""

import argparse

from fastvit_engine.commands.recipe import add_recipe


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("config", help="list recipes, or show one as it will be used")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the recipes that come with the engine").set_defaults(run=_list)
    show = actions.add_parser(
        "show",
        help="every value of a recipe and where it comes from",
        epilog="example:\n  fastvit config show vit_h14_jft --set zero.stage=2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe(show)
    show.set_defaults(run=_show)


def _list(args: argparse.Namespace) -> int:
    from fastvit_engine.config import RECIPES, recipe_names

    for name in recipe_names():
        first_line = (RECIPES / f"{name}.yaml").read_text().partition("\n")[0]
        print(f"{name:<24} {first_line.removeprefix('# ')}")
    return 0


def _show(args: argparse.Namespace) -> int:
    from fastvit_engine.config import load_config

    print(load_config(args.recipe, args.set).to_yaml(with_origins=True), end="")
    return 0
