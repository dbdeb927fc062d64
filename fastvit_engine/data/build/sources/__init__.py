"""Where `fastvit data make` takes images from: one file per format, and which one a source is."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from fastvit_engine.data.build.sources import imagenet, parquet, pixels, table, tars, webdataset
from fastvit_engine.data.build.sources.context import Context, is_image
from fastvit_engine.data.build.sources.folder import list_folder
from fastvit_engine.data.build.sources.listing import Listing, join
from fastvit_engine.data.shards.names import INFO_NAME
from fastvit_engine.errors import UserError

FORMATS: dict[str, Callable[[Path, Context], Listing]] = {
    "folder": list_folder,
    "class-tars": tars.list_class_tars,
    "flat-tar": tars.list_flat_tar,
    "imagenet": imagenet.list_imagenet,
    "webdataset": webdataset.list_webdataset,
    "cifar": pixels.list_cifar,
    "idx": pixels.list_idx,
    "parquet": parquet.list_parquet,
    "list": table.list_table,
    "digits": lambda path, context: pixels.list_digits(context),
}


def list_source(source: str, format: str | None, context: Context) -> Listing:
    """All images of `source`, in a fixed order. Raises UserError if it is not of the format, or holds no image."""
    path = Path(source).expanduser()
    format = format or recognise(source)
    listing = FORMATS[format](path, context)
    if len(listing) == 0:
        raise UserError(f"{source} holds no image: correct the source, or say with --format what it is")
    return listing


def list_with_eval(train: str, format: str | None, held_out: str, eval_labels: str | None, context: Context) -> Listing:
    """The images of two sources, those of `held_out` as the eval split, with the class names of `train`."""
    listing = list_source(train, format, context)
    if listing.held_out.any():
        raise UserError(f"{train} has an eval split of its own: leave out --eval-source")
    context = dataclasses.replace(context, classes=listing.classes, labels=eval_labels)
    return join(listing, list_source(held_out, None, context))


def recognise(source: str) -> str:
    """The format of a source, by its name and what is in it. Raises UserError if none fits."""
    if source == "digits":
        return "digits"
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _recognise_folder(path)
    except OSError as error:
        raise UserError(f"folder {error.filename} cannot be read ({error.strerror}): make it readable") from error
    if path.is_file():
        return _recognise_file(path)
    if any(character in source for character in "*?[{"):
        return "webdataset"
    raise UserError(
        f"there is no folder or file {path}: give one of images, tars, Parquet files or a list, or 'digits'"
    )


def _recognise_folder(path: Path) -> str:
    names = sorted(os.listdir(path))
    if imagenet.TRAIN in names:
        return "imagenet"
    if INFO_NAME in names:
        return "webdataset"
    if any((path / name).is_file() for name in ("data_batch_1", "batches.meta", "meta")):
        return "cifar"
    if any("images" in name and name.endswith(pixels.IDX_SUFFIXES) for name in names):
        return "idx"
    if any(name.endswith(".parquet") for name in names) or list((path / "data").glob("*.parquet")):
        return "parquet"
    tar_names = [name for name in names if tars.is_tar_name(name)]
    if tar_names:
        return "webdataset" if _recognise_tar(path / tar_names[0]) == "webdataset" else "class-tars"
    return "folder"


def _recognise_file(path: Path) -> str:
    if path.suffix in table.SUFFIXES:
        return "list"
    if path.suffix == ".parquet":
        return "parquet"
    if tars.is_tar_name(path.name):
        return _recognise_tar(path)
    raise UserError(f"{path} is of no known kind: say with --format what it is ({', '.join(sorted(FORMATS))})")


def _recognise_tar(path: Path) -> str:
    """By the first few files in it."""
    names = tars.first_members(path, 8)
    if not names:
        raise UserError(f"the tar {path} is empty: download or make it again")
    if any(name.endswith(".tar") for name in names):
        return "class-tars"
    if any(name.rpartition("/")[2] in pixels.CIFAR_FILES for name in names):
        return "cifar"
    stems = [name.rpartition("/")[2].partition(".")[0] for name in names]
    has_labels = any(name.endswith((".cls", ".json")) for name in names)
    if has_labels or (len(set(stems)) < len(stems)):
        return "webdataset"
    if all(is_image(name) for name in names):
        return "flat-tar"
    raise UserError(f"the tar {path} holds {names[0]}, of no known kind: say with --format what it is")
