"""`fastvit data stats`: what shards hold."""

import argparse

from fastvit_engine.commands.data.options import add_common, wrapped
from fastvit_engine.commands.parser import output_path_or_url
from fastvit_engine.commands.settings import add_settings, load_settings
from fastvit_engine.shown import say


def add(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stats = actions.add_parser(
        "stats",
        help="classes, sizes, aspect ratios, mean and deviation of the pixels",
        description=wrapped(
            "Say what SHARDS hold: classes, bytes, image sizes and shapes, and mean and standard deviation of "
            "the pixels of evenly spaced images."
        ),
        epilog="example:\n  fastvit data stats data/photos --sheet photos.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stats.add_argument("shards", metavar="SHARDS", help="a folder, a shard, a glob, a brace pattern or a URL")
    stats.add_argument("--split", choices=("train", "eval"), help="of a folder with a dataset.json (default: both)")
    stats.add_argument(
        "--sheet", type=output_path_or_url, metavar="FILE.png", help="also draw a sheet of images with class names"
    )
    add_settings(stats)
    add_common(stats)
    stats.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.data.check.contact_sheet import class_sheet, save_sheet
    from fastvit_engine.data.check.stats import shard_stats
    from fastvit_engine.data.shards.remote_path import any_path

    config = load_settings(args).config
    stats = shard_stats(args.shards, config, split=args.split, workers=args.workers)
    if args.sheet is not None:
        save_sheet(class_sheet(args.shards, config, split=args.split), any_path(args.sheet))
    if args.json:
        print(stats.to_json())
    else:
        say(stats.report())
    return 0
