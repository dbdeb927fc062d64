"""`fastvit data index`: where each sample of shards begins."""

import argparse
from functools import partial

from fastvit_engine.commands.data.options import add_ray, workers_of, wrapped
from fastvit_engine.commands.parser import output_path_or_url, positive
from fastvit_engine.commands.settings import add_settings, load_settings
from fastvit_engine.shown import say


def add(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    index = actions.add_parser(
        "index",
        help="write the index of shards, which checks them too",
        description=wrapped(
            "Read the headers of plain tar shards and write where each sample begins, which training needs to read "
            "them in an exact order. Damaged shards are named with the byte. Shards that have not changed since the "
            "last time are not read again. Shards and index may be in object stores, and shards on web servers."
        ),
        epilog="Training finds shards.index beside the shards; any other name goes into data.index.\n\n"
        "examples:\n  fastvit data index 'data/photos/train-*.tar' --out data/photos/shards.index\n"
        "  fastvit data index s3://bucket/photos",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    index.add_argument("shards", metavar="SHARDS", nargs="+", help="folders, globs, brace patterns or URLs")
    index.add_argument(
        "--out", type=output_path_or_url, metavar="FILE", help="the index to write or bring up to date, here or in an "
        "object store (default: shards.index beside the shards)"
    )  # fmt: skip
    index.add_argument("--label-key", metavar="KEY", help="member, or json.FIELD, with the label: short for --set "
                       "data.label_key=KEY (default cls)")  # fmt: skip
    index.add_argument(
        "--processes", type=positive, metavar="N", help="read so many shards at once (default: one per core)"
    )
    add_ray(index)
    add_settings(index)
    index.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.data.build.parallel import check_workers, ordered_map, some_of
    from fastvit_engine.data.shards.index import INDEX_NAME, INDEX_SUFFIX, write_index
    from fastvit_engine.data.shards.names import list_shards, shard_set
    from fastvit_engine.data.shards.remote_path import any_path, common_folder
    from fastvit_engine.data.shards.sample import Ignored, describe_ignored
    from fastvit_engine.errors import UserError
    from fastvit_engine.observe.units import counted

    if args.out is not None and not args.out.endswith(INDEX_SUFFIX):
        raise UserError(f"--out is {args.out}: let its name end in {INDEX_SUFFIX}, by which training knows an index")
    if args.processes is not None and args.processes < 1:
        raise UserError(f"--processes is {args.processes}: at least 1")
    shards = list_shards(args.shards, named="SHARDS")
    label_key = args.label_key or load_settings(args).config.data.label_key
    out = any_path(args.out) if args.out else common_folder([any_path(shard) for shard in shards]) / INDEX_NAME
    with workers_of(args.ray, args.processes) as workers:
        run = None if workers is None or isinstance(workers, int) else partial(ordered_map, workers=workers)
        check_workers(workers, some_of(shards))
        index = write_index(shards, out, label_key=label_key, processes=args.processes, run=run, progress=say)
    classes = index.class_counts()
    unlabelled = int(index.unlabelled.sum())
    labels = counted(len(classes), "class", "classes") + (f", {unlabelled:,} without a label" if unlabelled else "")
    ignored = describe_ignored(sum(index.ignored, Ignored()))
    found = f"{counted(index.samples, 'sample')} in {counted(len(shards), 'shard')}"
    say(f"{out}: {found}, {labels}, hash {index.hash}{ignored}")
    for missing in sorted(set().union(*(shard_set(argument).missing for argument in args.shards))):
        say(f"warning: {missing}, which dataset.json lists, does not exist: copy it there, or make the shards again")
    return 0
