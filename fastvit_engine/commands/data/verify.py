"""`fastvit data verify`: what is wrong with shards."""

import argparse

from fastvit_engine.commands.data.options import add_common, add_ray, workers_of, wrapped
from fastvit_engine.commands.settings import add_settings, load_settings, num_classes_of
from fastvit_engine.shown import say


def add(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verify = actions.add_parser(
        "verify",
        help="find damaged shards, bad images, wrong labels, duplicates, skew",
        description=wrapped(
            "Read every sample of SHARDS and say what is wrong. Errors are what would stop or falsify a "
            "training run: damaged tars, images that do not decode, missing members, labels out of range, keys that "
            "occur twice, shards that dataset.json does not agree with. Warnings: images that occur twice, shards "
            "that dataset.json does not list, and shards that differ from the others in size or classes by more than "
            "--skew. Exit code 1 if there are errors."
        ),
        epilog="examples:\n  fastvit data verify data/photos --num-classes 120\n"
        "  fastvit data verify 's3://bucket/train-*.tar' --set data.label_key=json.labels",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("shards", metavar="SHARDS", help="a folder, a shard, a glob, a brace pattern or a URL")
    verify.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="labels are 0..N-1 (default: model.num_classes if it is set, else dataset.json's)",
    )
    verify.add_argument(
        "--skew", type=float, default=2.0, metavar="FACTOR", help="by which a shard may differ (default 2)"
    )
    verify.add_argument("--strict", action="store_true", help="exit code 1 for warnings too")
    add_settings(verify)
    add_common(verify)
    add_ray(verify)
    verify.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.data.check.verify import verify_shards

    settings = load_settings(args)
    num_classes = num_classes_of(settings) if args.num_classes is None else args.num_classes
    with workers_of(args.ray, args.workers) as workers:
        verdict = verify_shards(args.shards, settings.config, num_classes=num_classes, skew=args.skew, workers=workers)
    if args.json:
        print(verdict.to_json())
    else:
        say(verdict.report())
    return 1 if verdict.errors or (args.strict and verdict.warnings) else 0
