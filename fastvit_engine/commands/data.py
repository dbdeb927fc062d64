"""The `fastvit data` commands."""

import argparse
import textwrap
from pathlib import Path

_SOURCES = """\
sources, recognised by what they are (--format says it explicitly):
  folder      one sub-folder of images a class; or train/ and val/ with those
  imagenet    the folder with ILSVRC2012_img_train.tar (and _val.tar and _devkit_t12.tar.gz)
  class-tars  a tar of class tars, or a folder of them: ImageNet-21k, ImageNet-1k's training images
  flat-tar    a tar of images, with --labels FILE
  webdataset  shards to be made anew (images, cls, json): a folder, a glob, a brace pattern
  parquet     a file or a folder of Hugging Face's layout; needs pyarrow
  list        .csv, .tsv or .jsonl: path or url, and label or labels
  cifar       CIFAR-10 or -100, Python version: folder or tar.gz
  idx         the folder with MNIST's or Fashion-MNIST's four files
  digits      the word 'digits': scikit-learn's scans

A split that the source has (CIFAR's test images, val/, validation-*.parquet ...) becomes the eval split.
"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    data = commands.add_parser(
        "data",
        help="make, index, verify and look at shards",
        description=_wrapped("Make WebDataset shards, index and verify them, and see what is in them."),
        epilog="example:\n  fastvit data make photos/ --out shards/photos\n  fastvit data verify shards/photos",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_make(actions)
    _add_index(actions)
    _add_verify(actions)
    _add_stats(actions)
    _add_show(actions)
    _add_bench(actions)


def _add_make(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    make = actions.add_parser(
        "make",
        help="write images from folders, tars, Parquet, lists ... as shards",
        description=_wrapped(
            "Write images as globally shuffled WebDataset shards with an evaluation split. A run that was "
            "stopped goes on where it was; running it again when it is done does nothing."
        ),
        epilog=f"{_SOURCES}\nexamples:\n  fastvit data make photos/ --out shards/photos --eval-fraction 0.05\n"
        "  fastvit data make winter21_whole.tar.gz --out shards/i21k --resize 256 --workers 16 --max-failed 0.001\n"
        "  fastvit data make list.csv --out shards/web --max-failed 0.1\n\n"
        "on several machines, here as a SLURM array of 8:\n"
        "  fastvit data make SOURCE --out DIR --plan-only                        # once, first\n"
        "  srun ... fastvit data make SOURCE --out DIR --part $SLURM_ARRAY_TASK_ID/8   # --array=1-8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    make.add_argument("source", metavar="SOURCE", help="a folder, file or pattern; see below")
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the shards")
    source = make.add_argument_group("source")
    source.add_argument("--format", metavar="NAME", help="what SOURCE is (default: seen from what it holds)")
    source.add_argument("--labels", metavar="FILE|COLUMN", help="labels of a flat tar; label column of a list")
    source.add_argument("--classes", type=Path, metavar="FILE", help="class names in label order, one a line")
    source.add_argument("--eval-source", metavar="SOURCE", help="where the eval split comes from")
    source.add_argument("--eval-labels", metavar="FILE|COLUMN", help="--labels of --eval-source")
    source.add_argument("--max-failed", type=float, default=0.0, metavar="SHARE", help="of images that may be bad or "
                        "not be had; they are listed in failed.jsonl (default 0: the first one stops)")  # fmt: skip
    shards = make.add_argument_group("shards")
    shards.add_argument("--eval-fraction", type=float, metavar="F", help="share of each class held out (default: the "
                        "source's own split, otherwise 0.1)")  # fmt: skip
    shards.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="at most (default 1000)")
    shards.add_argument("--seed", type=int, default=0, help="of the split and the order (default 0)")
    shards.add_argument("--resize", type=int, metavar="N", help="scale longer short sides down to N pixels; smaller "
                        "images keep their bytes")  # fmt: skip
    shards.add_argument("--quality", type=int, default=90, metavar="Q", help="of JPEGs that --resize writes "
                        "(default 90)")  # fmt: skip
    shards.add_argument("--dedup", action="store_true", help="leave out images whose bytes occur twice")
    work = make.add_argument_group("work")
    work.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    work.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help="write every N-th shard, from the I-th")
    work.add_argument("--plan-only", action="store_true", help="list and shuffle, for --part to start from")
    make.set_defaults(run=_make)


def _add_verify(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verify = actions.add_parser(
        "verify",
        help="find damaged shards, bad images, wrong labels, duplicates, skew",
        description=_wrapped(
            "Read every sample of SHARDS and say what is wrong. Errors are what would stop or falsify a "
            "training run: damaged tars, images that do not decode, missing members, labels out of range, keys that "
            "occur twice, shards that dataset.json does not agree with. Warnings: images that occur twice, and shards "
            "that differ from the others in size or classes by more than --skew. Exit code 1 where there are errors."
        ),
        epilog="example:\n  fastvit data verify shards/photos --num-classes 120",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("shards", metavar="SHARDS", help="a folder, a shard, a glob or a brace pattern")
    verify.add_argument("--num-classes", type=int, metavar="N", help="labels are 0..N-1 (default: dataset.json's)")
    verify.add_argument(
        "--skew", type=float, default=2.0, metavar="FACTOR", help="by which a shard may differ (default 2)"
    )
    verify.add_argument("--strict", action="store_true", help="exit code 1 for warnings too")
    _add_common(verify)
    verify.set_defaults(run=_verify)


def _add_stats(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stats = actions.add_parser(
        "stats",
        help="classes, sizes, aspect ratios, mean and deviation of the pixels",
        description=_wrapped(
            "Say what SHARDS hold: classes, bytes, image sizes and shapes, and mean and standard deviation of "
            "the pixels of evenly spaced images."
        ),
        epilog="example:\n  fastvit data stats shards/photos --sheet photos.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stats.add_argument("shards", metavar="SHARDS", help="a folder, a shard, a glob or a brace pattern")
    stats.add_argument("--split", choices=("train", "eval"), help="of a folder with a dataset.json (default: both)")
    stats.add_argument("--sheet", type=Path, metavar="FILE.png", help="also draw a sheet of images with class names")
    _add_common(stats)
    stats.set_defaults(run=_stats)


def _add_show(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from fastvit_engine.commands.recipe import add_recipe

    show = actions.add_parser(
        "show",
        help="draw training images as a recipe augments them",
        description=_wrapped(
            "Draw a sheet of training images: originals on the left, and beside each what the recipe's "
            "augmentation makes of it in one epoch after the other."
        ),
        epilog="example:\n  fastvit data show photos --set data.train=shards/photos --sheet augmented.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe(show)
    show.add_argument("--sheet", type=Path, required=True, metavar="FILE.png", help="the picture to write")
    show.add_argument("--rows", type=int, default=6, metavar="N", help="originals (default 6)")
    show.add_argument("--draws", type=int, default=8, metavar="N", help="augmented images of each (default 8)")
    show.set_defaults(run=_show)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100)


def _part(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 1/8")
    return int(part), int(parts)


def _make(args: argparse.Namespace) -> int:
    from fastvit_engine.data.build.make import make_dataset

    names = (
        "format", "labels", "classes", "eval_source", "eval_labels", "eval_fraction", "samples_per_shard", "seed",
        "resize", "quality", "dedup", "max_failed", "workers", "part", "plan_only",
    )  # fmt: skip
    make_dataset(args.source, args.out, **{name: getattr(args, name) for name in names})
    return 0


def _verify(args: argparse.Namespace) -> int:
    from fastvit_engine.data.check.verify import verify_shards

    verdict = verify_shards(args.shards, num_classes=args.num_classes, skew=args.skew, workers=args.workers)
    print(verdict.to_json() if args.json else verdict.report())
    return 1 if verdict.errors or (args.strict and verdict.warnings) else 0


def _stats(args: argparse.Namespace) -> int:
    from fastvit_engine.data.check.contact_sheet import class_sheet, save_sheet
    from fastvit_engine.data.check.stats import shard_stats

    stats = shard_stats(args.shards, split=args.split, workers=args.workers)
    if args.sheet is not None:
        save_sheet(class_sheet(args.shards, split=args.split), args.sheet)
    print(stats.to_json() if args.json else stats.report())
    return 0


def _show(args: argparse.Namespace) -> int:
    from fastvit_engine.config import load_config
    from fastvit_engine.data.check.contact_sheet import augmented_sheet, save_sheet

    config = load_config(args.recipe, args.set).config
    save_sheet(augmented_sheet(config, rows=args.rows, draws=args.draws), args.sheet)
    print(args.sheet)
    return 0


def _add_index(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    index = actions.add_parser(
        "index",
        help="write the index of shards, which checks them too",
        description="Reads the headers of plain tar shards and writes where each sample begins, which training needs\n"
        "to read them in an exact order. Damaged shards are named with the byte. Shards that have not changed since\n"
        "the last time are not read again. Remote shards (s3://, https://, ...) are read through fsspec.",
        epilog="example:\n  fastvit data index 'shards/train-*.tar' --out shards/shards.index\n\n"
        "Training finds shards.index beside the shards; any other name goes into data.index.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    index.add_argument("shards", metavar="SHARDS", nargs="+", help="folders, globs, brace patterns or URLs")
    index.add_argument("--out", type=Path, required=True, metavar="FILE", help="the index to write or bring up to date")
    index.add_argument("--label-key", default="cls", help="member, or json.FIELD, with the label (default cls)")
    index.add_argument("--processes", type=int, metavar="N", help="read so many shards at once (default: one a core)")
    index.set_defaults(run=_index)


def _index(args: argparse.Namespace) -> int:
    from fastvit_engine.data.shards.index import INDEX_SUFFIX, write_index
    from fastvit_engine.data.shards.names import list_shards
    from fastvit_engine.errors import UserError

    if args.out.suffix != INDEX_SUFFIX:
        raise UserError(f"--out is {args.out}: let its name end in {INDEX_SUFFIX}, by which training knows an index")
    if args.processes is not None and args.processes < 1:
        raise UserError(f"--processes is {args.processes}: at least 1")
    shards = list_shards(args.shards, named="SHARDS")
    index = write_index(shards, args.out, label_key=args.label_key, processes=args.processes, progress=print)
    classes = index.class_counts()
    unlabelled = int(index.unlabelled.sum())
    labels = f"{len(classes):,} classes" + (f", {unlabelled:,} without a label" if unlabelled else "")
    print(f"{args.out}: {index.samples:,} samples in {len(shards):,} shards, {labels}, hash {index.hash}")
    return 0


def _add_bench(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    bench = actions.add_parser(
        "bench",
        help="measure reading, decoding and augmenting, beside other ways to do it",
        description="Measures how many training images a CPU-second gives, stage by stage and as whole loaders: this\n"
        "engine, WebDataset with the usual transforms, WebDataset with fast ones, and timm. Takes the first 256 MB of\n"
        "the shards and writes nothing beside them.",
        epilog="example:\n  fastvit data bench shards/photos --repack 256 --out bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("shards", metavar="SHARDS", help="a folder, a glob or a brace pattern")
    bench.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="of the crops (default 224)")
    bench.add_argument("--workers", type=int, default=2, metavar="N", help="processes of each loader (default 2)")
    bench.add_argument("--rounds", type=int, metavar="N", help="how often everything is measured (default 9)")
    bench.add_argument("--repack", type=int, metavar="PIXELS", help="measure on the images with this short side too")
    bench.add_argument("--out", type=Path, metavar="DIR", help="write data_bench.md, .json and .png there")
    bench.add_argument("--quick", action="store_true", help="two short rounds, for a first impression")
    bench.add_argument("--json", action="store_true", help="print the figures as JSON")
    bench.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    import json
    import sys

    from benchmarks.data_loading.run import FULL, QUICK, bench
    from fastvit_engine.errors import UserError

    for name in ("image_size", "workers", "rounds", "repack"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: at least 1")
    effort = QUICK if args.quick else FULL
    text, record = bench(
        args.shards,
        image_size=args.image_size,
        workers=args.workers,
        effort=effort._replace(rounds=args.rounds or effort.rounds),
        repack=args.repack,
        out=args.out,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(record) if args.json else text, end="\n" if args.json else "")
    return 0
