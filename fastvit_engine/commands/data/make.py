"""`fastvit data make`: images from folders, tars, Parquet, lists ... to shards."""

import argparse

from fastvit_engine.commands.data.options import add_ray, workers_of, wrapped
from fastvit_engine.commands.parser import output_path_or_url, path_or_url
from fastvit_engine.errors import UserError

_SOURCES = """\
sources, recognised by what they are (--format says it explicitly):
  folder      one sub-folder of images per class; or train/ and val/ (or test/) with those
              (class-folders: every sub-folder is a class; split-folders: by the words train, val, test)
  imagenet    the folder with ILSVRC2012_img_train.tar (and _val.tar and _devkit_t12.tar.gz), or
              Kaggle's with ILSVRC/Data/CLS-LOC and LOC_val_solution.csv; or without the training tar,
              to evaluate only
  pets        the folder with images.tar.gz and annotations.tar.gz (Oxford-IIIT Pets)
  flowers     the folder with 102flowers.tgz, imagelabels.mat and setid.mat; trains on train and val
  objectnet   the unpacked folder objectnet-1.0, to evaluate a model of ImageNet-1k
  class-tars  a tar of class tars, or a folder of them: ImageNet-21k, ImageNet-1k's training images
  folder-tar  a tar of such a folder as above
  flat-tar    a tar of images, with --labels FILE
  webdataset  shards to be made anew (images, cls, json): a folder, a glob, a brace pattern
  parquet     a file or a folder of Hugging Face's layout; needs pyarrow
  list        .csv or .tsv (comma, semicolon or tab) or .jsonl: path or url, and label or labels;
              .txt: a path and a label on each line
  split-lists the folder with such .txt lists: train, val, test, or train800val200 (VTAB-1k)
  cifar       CIFAR-10 or -100, Python version: folder or tar.gz
  idx         the folder with MNIST's or Fashion-MNIST's four files
  digits      the word 'digits': scikit-learn's scans

A split that the source has (CIFAR's test images, val/, validation-*.parquet ...) becomes the eval split. A source
that can be read in two ways is refused, with a command for each.

Labels: integers are class indices from 0, anything else is a class name, in alphabetical order. Folders are always
names, in numeric order if they are numbers. Null, NaN and empty labels are none; such rows count as failed.
What is not used is counted by reason, in the last line and in dataset.json.
"""


def add(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    make = actions.add_parser(
        "make",
        help="write images from folders, tars, Parquet, lists ... as shards",
        description=wrapped(
            "Write images as globally shuffled WebDataset shards with an evaluation split. A run that was "
            "stopped resumes; running it again when it is done does nothing."
        ),
        epilog=f"{_SOURCES}\nexamples:\n  fastvit data make photos/ --out data/photos --eval-fraction 0.05\n"
        "  fastvit data make winter21_whole.tar.gz --out data/i21k --resize 256 --workers 16 --max-failed 0.001\n"
        "  fastvit data make list.csv --out data/web --max-failed 0.1\n"
        "  fastvit data make s3://bucket/photos --out s3://bucket/shards\n\n"
        "on several machines, here as a SLURM array of 8:\n"
        "  fastvit data make SOURCE --out DIR --plan-only                        # once, first\n"
        "  srun ... fastvit data make SOURCE --out DIR --part $SLURM_ARRAY_TASK_ID/8   # --array=1-8\n\n"
        "on a Ray cluster, from one of its nodes:\n"
        "  fastvit data make SOURCE --out DIR --ray auto",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    make.add_argument("source", type=path_or_url, metavar="SOURCE", help="a folder, file, pattern or URL; see below")
    make.add_argument("--out", type=output_path_or_url, required=True, metavar="DIR", help="new folder for the shards, "
                      "here or in an object store")  # fmt: skip
    source = make.add_argument_group("source")
    source.add_argument("--format", metavar="NAME", help="what SOURCE is (default: seen from what it holds)")
    source.add_argument("--labels", metavar="FILE|COLUMN", help="labels of a flat tar, also ReaL's real.json; "
                        "label column of a list or Parquet; label member of shards, such as json.labels")  # fmt: skip
    source.add_argument("--image-column", metavar="COLUMN", help="column of paths, URLs or images of a list or Parquet")
    source.add_argument("--label-column", metavar="COLUMN", help="column of labels of a list or Parquet")
    source.add_argument("--classes", type=path_or_url, metavar="FILE", help="class names in label order, one per line")
    source.add_argument("--eval-source", type=path_or_url, metavar="SOURCE", help="where the eval split comes from")
    source.add_argument("--eval-labels", metavar="FILE|COLUMN", help="--labels of --eval-source")
    source.add_argument("--leave-out", metavar="PATTERN", action="append", default=[], help="folders (by their path in "
                        "SOURCE), files, or splits of pets and flowers that are not taken, such as test or '*/test'; "
                        "may be repeated")  # fmt: skip
    source.add_argument("--max-failed", type=float, default=0.0, metavar="SHARE", help="fraction of images that may be "
                        "unreadable, missing or unlabelled; failed.jsonl names them (default 0: none)")  # fmt: skip
    shards = make.add_argument_group("shards")
    shards.add_argument("--eval-fraction", type=float, metavar="F", help="share of each class held out (default: the "
                        "source's own split, otherwise 0.1)")  # fmt: skip
    shards.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="at most (default 1000)")
    shards.add_argument("--seed", type=int, default=0, help="of the split and the order (default 0)")
    shards.add_argument("--resize", type=int, metavar="N", help="scale longer short sides down to N pixels; smaller "
                        "images keep their bytes")  # fmt: skip
    shards.add_argument("--quality", type=int, default=90, metavar="Q", help="of JPEGs that --resize writes "
                        "(default 90)")  # fmt: skip
    shards.add_argument("--max-pixels", type=int, metavar="N", help="images with more have failed (default: that of "
                        "data.max_pixels)")  # fmt: skip
    shards.add_argument("--dedup", action="store_true", help="leave out images whose bytes occur twice")
    work = make.add_argument_group("work")
    work.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    work.add_argument(
        "--part", type=part_of, default=(1, 1), metavar="I/N", help="write every N-th shard, from the I-th"
    )
    add_ray(work)
    work.add_argument("--plan-only", action="store_true", help="list and shuffle, for --part to start from")
    make.set_defaults(run=_run)


def part_of(text: str) -> tuple[int, int]:
    """The type of --part. Raises ArgumentTypeError unless `text` has the form I/N."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 1/8")
    return int(part), int(parts)


def _run(args: argparse.Namespace) -> int:
    from fastvit_engine.data.build.make import make_dataset
    from fastvit_engine.data.shards.remote_path import any_path

    names = (
        "format", "labels", "classes", "eval_source", "eval_labels", "image_column", "label_column",
        "eval_fraction", "samples_per_shard", "seed",
        "resize", "quality", "max_pixels", "dedup", "leave_out", "max_failed", "part", "plan_only",
    )  # fmt: skip
    options = {name: getattr(args, name) for name in names}
    if args.classes is not None:
        options["classes"] = any_path(args.classes)
    if args.ray is not None and args.part != (1, 1):
        raise UserError("--part and --ray both share out the work: leave out one of them")
    with workers_of(args.ray, args.workers) as workers:
        make_dataset(args.source, args.out, workers=workers, **options)
    return 0
