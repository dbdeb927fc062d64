"""Where `fastvit data make` takes images from: one file per format, and which one a source is."""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator

from fastvit_engine.data.build.sources import (
    flowers,
    folder,
    imagenet,
    objectnet,
    parquet,
    pets,
    pixels,
    split_lists,
    table,
    tars,
    webdataset,
    zips,
)
from fastvit_engine.data.build.sources.context import Context, is_image
from fastvit_engine.data.build.sources.layout import NAMELESS, NOT_CLASSES
from fastvit_engine.data.build.sources.listing import Listing, join
from fastvit_engine.data.shards.names import INFO_NAME
from fastvit_engine.data.shards.remote_path import AnyPath, RemotePath, any_path, is_pattern, is_remote
from fastvit_engine.data.shards.sample import split_name
from fastvit_engine.data.shards.splits import Splits, may_name_split, split_of
from fastvit_engine.errors import UserError

FORMATS: dict[str, Callable[[AnyPath, Context], Listing]] = {
    "folder": folder.list_folder,
    "class-folders": folder.list_class_folders,
    "split-folders": folder.list_split_folders,
    "folder-tar": tars.list_folder_tar,
    "class-tars": tars.list_class_tars,
    "flat-tar": tars.list_flat_tar,
    "imagenet": imagenet.list_imagenet,
    "webdataset": webdataset.list_webdataset,
    "cifar": pixels.list_cifar,
    "idx": pixels.list_idx,
    "parquet": parquet.list_parquet,
    "list": table.list_table,
    "split-lists": split_lists.list_split_lists,
    "pets": pets.list_pets,
    "flowers": flowers.list_flowers,
    "objectnet": objectnet.list_objectnet,
    "digits": lambda path, context: pixels.list_digits(context),
}
_LABELLED = {"imagenet", "folder-tar", "flat-tar", "webdataset", "parquet", "list"}  # by what --labels names
_UNKNOWN = "of no known kind: say with --format what it is"


def list_source(source: str, format: str | None, context: Context) -> Listing:
    """All images of `source`, in a fixed order; adds to `context` what the source was taken for, and what is left out.

    Raises UserError if it is not of the format, if it holds no image, and, with a command for each, if it can be read
    in two ways.
    """
    path = any_path(source)
    context.certain = format is not None
    format = format or recognise(source, context, path)
    if context.labels is not None and format not in _LABELLED:
        raise UserError(
            f"{source} is {format}, which has labels of its own: leave out --labels (--eval-labels of --eval-source)"
        )
    described = len(context.descriptions)
    listing = FORMATS[format](path, context)
    if len(context.descriptions) == described:
        context.describe(format)
    if context.leave_out and not context.heeded_leave_out:
        raise UserError(
            f"--leave-out is for folders of images, tars or Parquet files, and {source} is {format}: remove it"
        )
    if len(listing) == 0:
        raise UserError(f"{source} holds no image: correct the source, or say with --format what it is")
    left_out = Counter(listing.left_out) + context.counts
    context.counts.clear()
    return dataclasses.replace(listing, left_out=dict(left_out))


def list_with_eval(train: str, format: str | None, held_out: str, eval_labels: str | None, context: Context) -> Listing:
    """The images of two sources, those of `held_out` as the eval split, with the class names of `train`."""
    listing = list_source(train, format, context)
    if listing.eval_only:
        raise UserError(f"{train} is to be evaluated on: name it with --eval-source, and what to train on as SOURCE")
    if listing.held_out.any():
        raise UserError(f"{train} has an eval split of its own: leave out --eval-source")
    other = dataclasses.replace(context, classes=listing.classes, labels=eval_labels, source=held_out, leave_out=[])
    evaluation = list_source(held_out, None, other)
    if evaluation.held_out.any() and not evaluation.eval_only:
        raise UserError(f"{held_out} has an eval split of its own: name one split of it with --eval-source")
    _check_apart(listing, evaluation, held_out)
    return join(listing, evaluation)


def _check_apart(train: Listing, evaluation: Listing, held_out: str) -> None:
    """Raises UserError if an image of --eval-source is among those to train on."""

    def places(listing: Listing) -> Iterator[tuple[str, int]]:
        for index in range(len(listing)):
            file = listing.files[listing.file[index]]
            yield _place(file.kind, file.path, listing.name(index)), int(listing.offset[index])

    roots = [_real(file.path) for file in evaluation.files if file.kind == "path"]
    files = {_real(file.path) for file in evaluation.files if file.kind not in ("path", "url")}
    apart = not any(
        file.kind == "url" or _real(file.path) in files or _share_a_folder(_real(file.path), roots)
        for file in train.files
    )
    if apart:
        return
    known = set(places(evaluation))
    shared = next((place for place in places(train) if place in known), None)
    if shared is not None:
        raise UserError(
            f"--eval-source {held_out} has {shared[0]}, which is among the images to train on: name a source of other "
            "images"
        )


def _place(kind: str, path: str, name: str) -> str:
    """Where an image is, besides its offset."""
    if kind == "url":
        return name
    return os.path.join(_real(path), name) if kind == "path" else _real(path)


def _real(path: str) -> str:
    """A local path without links; a URL as it is."""
    return path if is_remote(path) else os.path.realpath(path)


def _share_a_folder(folder: str, others: list[str]) -> bool:
    """Whether a folder is one of the others, in one of them, or around one."""
    return any(f"{folder}/".startswith(f"{other}/") or f"{other}/".startswith(f"{folder}/") for other in others)


def recognise(source: str, context: Context | None = None, path: AnyPath | None = None) -> str:
    """The format of a source, by its name and what is in it. Raises UserError if none fits, or two do.

    `path` is the source as a path, if it has been made: a remote one is listed once for all that ask it.
    """
    if source == "digits":
        return "digits"
    path = any_path(source) if path is None else path
    if is_pattern(source) and (is_remote(source) or not path.exists()):
        return "parquet" if source.rstrip("}").endswith(".parquet") else "webdataset"
    try:
        if path.is_dir():
            names = sorted(file.name for file in path.iterdir())
            kept = context.kept(names) if context else names
            return _recognise_folder(path, kept, context.command if context else Context.offer(source))
    except OSError as error:
        raise UserError(f"folder {error.filename} cannot be read ({error.strerror}): make it readable") from error
    if path.is_file():
        return _recognise_file(path)
    raise UserError(
        f"there is no folder or file {path}: give one of images, tars, Parquet files or a list, or 'digits'"
    )


def _recognise_folder(path: AnyPath, names: list[str], command: Callable[..., str]) -> str:
    if INFO_NAME in names:
        return "webdataset"
    if (known := _recognise_data_set(path, names, command)) is not None:
        return known
    if any((path / name).is_file() for name in ("data_batch_1", "batches.meta", "meta")):
        return "cifar"
    if any("images" in name and name.endswith(pixels.IDX_SUFFIXES) for name in names):
        return "idx"
    inner = next((name for name in names if not name.startswith(".") and (path / name).is_dir()), None)
    below = [] if inner is None else sorted(file.name for file in (path / inner).iterdir())
    if inner is not None and split_lists.holds_split_lists(path / inner, below):
        raise UserError(
            f"the lists of {path} are in folders, such as {inner}: make each by itself, as "
            f"`{command(source=f'{path}/{inner}')}`"
        )
    kinds = _kinds_in(path, names)
    if len(kinds) > 1:
        commands = " or ".join(f"`{command(*words[1:], source=words[0])}` for {what}" for what, words in kinds.items())
        raise UserError(f"{path} holds {' and '.join(kinds)}: choose with {commands}")
    kind = next(iter(kinds.values()), [str(path), "--format", "folder"])
    if kind[-1] == "class-tars":
        _check_class_tars(path, [name for name in names if tars.is_tar_name(name)], command)
    return kind[-1]


def _recognise_data_set(path: AnyPath, names: list[str], command: Callable[..., str]) -> str | None:
    """The format of a data set that has its own files, None if there is none. Refuses what may be two things."""
    found: dict[str, str] = {}
    if imagenet.holds_imagenet(path, names):
        found["imagenet"] = "ImageNet"
    if pets.holds_pets(path, names):
        found["pets"] = "Oxford-IIIT Pets"
    if flowers.holds_flowers(names):
        found["flowers"] = "Flowers-102"
    if objectnet.holds_objectnet(path, names):
        found["objectnet"] = "ObjectNet"
    if split_lists.holds_split_lists(path, names):
        found["split-lists"] = "lists of images"
    if found and "imagenet" not in found:
        other = next((name for name in names if _may_be_a_class(path, name)), None)
        if other is not None:
            found["folder"] = f"class folders, as {other} may be"
    if len(found) > 1:
        commands = " or ".join(f"`{command('--format', format)}` for {what}" for format, what in found.items())
        raise UserError(f"{path} holds {' and '.join(found.values())}: choose with {commands}")
    return next(iter(found), None)


def _may_be_a_class(path: AnyPath, name: str) -> bool:
    """Whether a folder holds images and may be a class, or a split with classes, and no folder around all images."""
    if name in NOT_CLASSES or name.lower() in NAMELESS or name.startswith(".") or not (path / name).is_dir():
        return False
    if split_of(name, folder=True) is None:
        return _holds_images(path / name)
    return any(file.is_dir() and _holds_images(file) for file in (path / name).iterdir())


def _kinds_in(path: AnyPath, names: list[str]) -> dict[str, list[str]]:
    """What of different kinds a folder holds, with the source and the options that choose it."""
    kinds: dict[str, list[str]] = {}
    tables = [name for name in names if name.endswith(".parquet")]
    archives = [name for name in names if tars.is_tar_name(name)]
    if archives and tables and all(_is_described(name, names) for name in archives):
        tables = []  # img2dataset's: the tables repeat what is in the shards
    folders = [name for name in names if (path / name).is_dir()]
    if tables or (not archives and any((path / "data").glob("*.parquet"))):
        kinds["Parquet files"] = [str(path), "--format", "parquet"]
    if archives and (format := _kind_of_tars(path, archives, alone=not tables and not folders)):
        kinds["tars"] = [str(path), "--format", format]
    if kinds and any(_holds_images(path / name) for name in folders if name not in NOT_CLASSES):
        kinds["folders of images"] = [str(path), "--format", "folder"]
    for ending, what in ((".tar", "tars"), (".parquet", "Parquet files")):
        inner = None if kinds else next((name for name in folders if any((path / name).glob(f"*{ending}"))), None)
        if inner is not None:
            raise UserError(f"the {what} of {path} are in folders, such as {inner}/: name all as '{path}/*/*{ending}'")
    return kinds


def _is_described(archive: str, names: list[str]) -> bool:
    """Whether a shard has the table and the figures beside it that img2dataset writes."""
    stem = archive.partition(".tar")[0]
    return f"{stem}.parquet" in names and f"{stem}_stats.json" in names


def _kind_of_tars(path: AnyPath, names: list[str], *, alone: bool) -> str | None:
    """The format of the tars of a folder, None if something else there may be meant and they are of no known kind."""
    try:
        return "webdataset" if _recognise_tar(path / names[0]) == "webdataset" else "class-tars"
    except UserError:
        if alone:
            raise
        return None


def _check_class_tars(path: AnyPath, names: list[str], command: Callable[..., str]) -> None:
    """Refuses tars whose names may be splits, as train.tar and val.tar, or no classes, as images.tar.gz."""
    nameless = next((name for name in names if name.partition(".")[0].lower() in NAMELESS), None)
    if nameless is not None:
        raise UserError(
            f"{path} can be read in two ways: with what is in {nameless}: `{command(source=str(path / nameless))}`; or "
            f"with '{nameless.partition('.')[0]}' as a class: `{command('--format', 'class-tars')}`"
        )
    named = [name for name in names if may_name_split(name)]
    if not named:
        return
    splits = Splits.of(names)
    if splits.unnamed or len(splits.train) != 1:
        other = command(*[word for name in named for word in ("--leave-out", name)])
        other = f"or leave them out: `{other}`" if len(named) < len(names) else "or unpack the tars of each split"
    else:
        held_out = splits.val or splits.test
        evaluation = ["--eval-source", str(path / held_out[0])] if held_out else []
        other = f"or with them as splits: `{command(*evaluation, source=str(path / splits.train[0]))}`"
    raise UserError(
        f"{path} can be read in two ways: with {', '.join(named[:3])} as classes: "
        f"`{command('--format', 'class-tars')}`; {other}"
    )


def _holds_images(folder: AnyPath) -> bool:
    below = folder.files_below() if isinstance(folder, RemotePath) else os.walk(folder)
    return any(is_image(name) for _, _, names in below for name in names)


def _recognise_file(path: AnyPath) -> str:
    if path.suffix.lower() in table.SUFFIXES:
        return "list"
    if path.suffix == ".parquet":
        return "parquet"
    if tars.is_tar_name(path.name):
        return _recognise_tar(path)
    if path.suffix.lower() == ".zip":
        raise UserError(zips.why_not_read(path))
    if path.suffix.lower() in (".7z", ".rar"):
        raise UserError(f"{path} is an archive, which is not read in place: unpack it, and name the folder instead")
    raise UserError(f"{path} is {_UNKNOWN} ({', '.join(sorted(FORMATS))})")


def _recognise_tar(path: AnyPath) -> str:
    """By the first few files in it."""
    names = tars.first_members(path, 8)
    if not names:
        raise UserError(f"the tar {path} is empty: download or make it again")
    if any(name.endswith(".tar") for name in names):
        return "class-tars"
    if any(name.rpartition("/")[2] in pixels.CIFAR_FILES for name in names):
        return "cifar"
    keys = [split[0] for name in names if (split := split_name(name)) is not None]
    if any(name.endswith(".cls") for name in names) or len(set(keys)) < len(keys):
        return "webdataset"
    images = [name for name in names if is_image(name)]
    if any("/" in name for name in images):
        return "folder-tar"
    if len(images) == len(names):
        return "flat-tar"
    if images and any(name.endswith(".json") for name in names):
        return "webdataset"
    raise UserError(f"the tar {path} holds {names[0]}, {_UNKNOWN}")
