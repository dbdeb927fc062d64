"""`fastvit data show`: training images as a recipe augments them."""

import argparse

from fastvit_engine.commands.data.options import wrapped
from fastvit_engine.commands.parser import output_path_or_url
from fastvit_engine.commands.recipe import add_recipe
from fastvit_engine.shown import say


def add(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    show = actions.add_parser(
        "show",
        help="draw training images as a recipe augments them",
        description=wrapped(
            "Draw a sheet of training images: originals on the left, and beside each what the recipe's "
            "augmentation makes of it in one epoch after the other."
        ),
        epilog="example:\n  fastvit data show photos --set data.train=data/photos --sheet augmented.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe(show)
    show.add_argument(
        "--sheet", type=output_path_or_url, required=True, metavar="FILE.png", help="the picture to write"
    )
    show.add_argument("--rows", type=int, default=6, metavar="N", help="originals (default 6)")
    show.add_argument("--draws", type=int, default=8, metavar="N", help="augmented images of each (default 8)")
    show.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.config import load_config
    from fastvit_engine.data.check.contact_sheet import augmented_sheet, save_sheet
    from fastvit_engine.data.shards.remote_path import any_path

    config = load_config(args.recipe, args.set).config
    save_sheet(augmented_sheet(config, rows=args.rows, draws=args.draws), any_path(args.sheet))
    say(args.sheet)
    return 0
