"""`fastvit data bench`: how fast shards become training batches."""

import argparse

from fastvit_engine.commands.data.options import wrapped
from fastvit_engine.commands.settings import add_settings, load_settings, num_classes_of
from fastvit_engine.shown import say

_ANY_CLASS = 10_000_000  # the most that a model may have: labels are not what is measured


def add(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    bench = actions.add_parser(
        "bench",
        help="measure reading, decoding and cropping, and the whole loader",
        description=wrapped(
            "Measure how many training images per second, and per second of CPU time, each stage and the whole loader "
            "give for your shards and your recipe: what tells which stage is slow. Takes the first 256 MB of local "
            "shards and writes nothing beside them. `fastvit bench data` measures other loaders beside it."
        ),
        epilog="examples:\n  fastvit data bench data/photos --set data.num_workers=8\n"
        "  fastvit data bench data/photos --recipe photos --repack 256",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("shards", metavar="SHARDS", help="a folder, a shard, a glob, a brace pattern or a URL")
    bench.add_argument("--workers", type=int, metavar="N", help="processes of the loader (default: data.num_workers)")
    bench.add_argument("--rounds", type=int, metavar="N", help="number of repetitions (default 5)")
    bench.add_argument("--repack", type=int, metavar="PIXELS", help="measure on the images with this short side too")
    bench.add_argument("--quick", action="store_true", help="two short rounds, for a first impression")
    add_settings(bench)
    bench.add_argument("--json", action="store_true", help="print the figures as JSON")
    bench.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    import sys

    from fastvit_engine.data.check.speed import FULL, QUICK, measure_speed, report, to_json
    from fastvit_engine.errors import UserError

    for name, least in (("workers", 0), ("rounds", 1), ("repack", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}: give at least {least}")
    settings = load_settings(args)
    config = settings.config
    if num_classes_of(settings) is None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"num_classes": _ANY_CLASS})})
    effort = QUICK if args.quick else FULL
    speeds = measure_speed(
        args.shards,
        config,
        workers=args.workers,
        effort=effort._replace(rounds=args.rounds or effort.rounds),
        repack=args.repack,
        progress=lambda line: say(line, file=sys.stderr),
    )
    if args.json:
        print(to_json(speeds))
    else:
        say(report(speeds))
    return 0
