"""Tar files read by offset: class tars (ImageNet's training images), and flat ones with a file of labels."""

import collections
import contextlib
import gzip
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from fastvit_engine.data.build.parallel import Counter, ordered_map, parallel_map
from fastvit_engine.data.build.sources.context import Context, why_left_out
from fastvit_engine.data.build.sources.devkit import listed_labels, validation_labels
from fastvit_engine.data.build.sources.label_column import Label
from fastvit_engine.data.build.sources.layout import NOT_CLASSES, Tree, arrange, images_of
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder
from fastvit_engine.data.shards.archive import open_archive, open_forward
from fastvit_engine.data.shards.remote_path import AnyPath, any_path
from fastvit_engine.data.shards.sample import is_macos_resource
from fastvit_engine.data.shards.tar import TarError, iterate_members
from fastvit_engine.errors import UserError

_PIECE = 1 << 20  # bytes that are decompressed at once


class TarFile(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int  # where its content begins in the file that holds the tar
    size: int


def files_of(path: AnyPath | str, start: int = 0, end: int | None = None) -> Iterator[TarFile]:
    """The files in the tar that bytes [start, end) of a file hold, by their headers alone.

    Raises UserError unless these bytes are a whole tar and nothing but it.
    """
    try:
        with open_archive(str(path)) as archive:
            size = (archive.size if end is None else end) - start

            def read(at: int, length: int) -> bytes:
                return archive.read(start + at, max(0, min(length, size - at)))

            for member in iterate_members(read, size):
                if member.is_file:
                    yield TarFile(member.name, start + member.data, member.size)
    except TarError as error:
        problem, byte = error.args
        moved = TarError(problem, byte if byte is None else start + byte)
        raise UserError(f"the tar {path} is damaged (it {moved}): copy or make it again") from error
    except OSError as error:
        raise UserError(f"the tar {path} cannot be read ({error.strerror or error}): make it readable") from error


def is_tar_name(name: str) -> bool:
    return name.endswith((".tar", ".tar.gz", ".tgz"))


def first_members(path: AnyPath, count: int) -> list[str]:
    """The names of the first files in a tar, compressed or not. Raises UserError if it is no tar."""
    names: list[str] = []
    try:
        with open_forward(str(path)) as (read, size):
            for member in iterate_members(read, size):
                if member.is_file and not is_macos_resource(member.name):
                    names.append(member.name)
                if len(names) == count or member.name.endswith(".tar"):  # which are large, and say enough
                    break
    except OSError as error:
        raise UserError(f"the tar {path} cannot be read ({error.strerror or error}): make it readable") from error
    except (TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = f"it {error}" if isinstance(error, TarError) else error
        raise UserError(f"the tar {path} is damaged ({reason}): copy or make it again") from error
    return names


def plain_tars(paths: list[AnyPath], context: Context) -> list[AnyPath]:
    """Each path itself, or a plain copy in the scratch folder if it is gzipped, which its name need not say."""
    plain = [context.scratch_file(path, ".tar") if _is_gzipped(path) else path for path in paths]
    gzipped = [(path, copy) for path, copy in zip(paths, plain, strict=True) if copy != path and not copy.exists()]
    if gzipped:
        names = str(gzipped[0][0]) if len(gzipped) == 1 else f"{len(gzipped)} gzipped tars"
        context.say(f"decompressing {names} into {context.scratch}, since images are read by their offsets")
        context.progress.start("decompressing", len(gzipped), "tars")
        done = Counter()

        for _ in parallel_map(
            partial(_decompress, done),
            gzipped,
            workers=context.workers,
            while_waiting=lambda: context.progress.update(done.value),
        ):
            pass
    return plain


def _decompress(done: Counter, pair: tuple[AnyPath, AnyPath]) -> None:
    path, copy = pair
    with Context.writing(copy) as target, open_forward(str(path)) as (read, _):
        try:
            at = 0
            while piece := read(at, _PIECE):
                target.write(piece)
                at += len(piece)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} is damaged ({error}): copy or download it again") from error
    done.add()


def _is_gzipped(path: AnyPath) -> bool:
    try:
        with open_archive(str(path)) as archive:
            return archive.read(0, 2) == b"\x1f\x8b"
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): make it readable") from error


def list_class_tars(path: AnyPath, context: Context) -> Listing:
    """A folder of tars or a tar of tars, each named by its class and holding the images of the class."""
    tars: list[tuple[str, AnyPath, int, int]] = []  # class, file, first and last byte of its tar
    if path.is_dir():
        kept = context.take([file.name for file in path.iterdir() if is_tar_name(file.name)], path, "tar")
        files = [path / name for name in sorted(kept)]
        for file, plain in zip(files, plain_tars(files, context), strict=True):
            tars.append((_class_of(file.name), plain, 0, plain.stat().st_size))
    else:
        (plain,) = plain_tars([path], context)
        for member in files_of(plain):
            if member.name.endswith(".tar"):
                tars.append((_class_of(member.name), plain, member.offset, member.offset + member.size))
    tars.sort(key=lambda entry: entry[0])
    builder = ListingBuilder(named=True)
    context.progress.start("listing", len(tars), "class tars")
    with contextlib.closing(ordered_map(_images_of_tar, tars, workers=context.workers)) as results:
        for done, ((name, file, _, _), (images, left_out)) in enumerate(zip(tars, results, strict=True)):
            builder.left_out.update(left_out)
            if not images:
                raise UserError(f"the class tar {name}.tar in {path} holds no image: remove it or download it again")
            _check_one_class(path, name, images, context)
            builder.add_file("bytes", file)
            for image in images:
                builder.add(image.name, [name], image.offset, image.size)
            context.progress.update(done + 1)
    context.describe("class tars")
    return builder.finish(context.classes, str(path))


def _check_one_class(path: AnyPath, name: str, images: list[TarFile], context: Context) -> None:
    """Refuses a tar with several folders of images, unless the format was given: these may be the classes."""
    folders = sorted({image.name.rpartition("/")[0] for image in images})
    if context.certain or len(folders) < 2:
        return
    source = f"{path}/{name}.tar" if path.is_dir() else "FOLDER"
    raise UserError(
        f"the tar {name}.tar in {path} has images in several folders, such as {folders[0] or '.'}/ and {folders[1]}/, "
        f"and can be read in two ways: with the folders as classes: `{context.command(source=source)}`; or with "
        f"'{name}' as the class: `{context.command('--format', 'class-tars')}`"
    )


def list_folder_tar(path: AnyPath, context: Context) -> Listing:
    """A tar of a folder of images: a folder for each class, or such folders for each split; see folder.list_folder.

    With context.labels, or if the images are in one folder, it is a flat tar.
    """
    if context.labels is not None:
        return list_flat_tar(path, context)
    (plain,) = plain_tars([path], context)
    tree, members = Tree(), {}
    hidden_folders: set[str] = set()
    for member in files_of(plain):
        name = os.path.normpath(member.name).lstrip("/")
        folder, _, file = name.rpartition("/")
        parts = folder.split("/")
        left = next((n for n, part in enumerate(parts) if part in NOT_CLASSES or part.startswith(".")), None)
        if left is not None:
            inner = "/".join(parts[: left + 1])
            (hidden_folders if parts[left].startswith(".") else tree.folders_left_out).add(inner)
        elif (kind := why_left_out(name)) is None:
            members[name] = member
            while folder not in tree.images:
                tree.images[folder] = []
                folder = folder.rpartition("/")[0]
            tree.images[name.rpartition("/")[0]].append(file)
        else:
            tree.left_out[kind] += 1
    if hidden_folders:
        tree.left_out["hidden folder"] += len(hidden_folders)
    tree, top = _without_outer_folders(tree, context.classes or [])
    if not tree.folders_in()[""]:
        return list_flat_tar(path, context)
    layout = arrange(tree, "folder", f"{path}/{top}".rstrip("/"), context.command)
    inside = tree.folders_in()
    builder = ListingBuilder(named=True)
    builder.left_out.update(layout.counts)
    builder.add_file("bytes", plain)
    for entry in layout.classes:
        builder.held_out = entry.held_out
        for image, _ in images_of(tree, inside, entry.path):
            member = members[os.path.join(top, entry.path, image)]
            builder.add(f"{entry.name}/{image}", [entry.name], member.offset, member.size)
    context.describe(f"a tar of {f'splits, {layout.splits}' if layout.splits else 'a folder of classes'}")
    context.left_out += layout.left_out
    return builder.finish(context.classes, str(path))


def _without_outer_folders(tree: Tree, classes: list[str]) -> tuple[Tree, str]:
    """The tree without the folders around all of its images, up to one of a known class; and their path."""
    top, inside = "", tree.folders_in()
    while len(inside[top]) == 1 and not tree.images[top] and inside[top][0].rpartition("/")[2] not in classes:
        top = inside[top][0]
    images = {
        folder[len(top) :].lstrip("/"): names
        for folder, names in tree.images.items()
        if folder == top or folder.startswith(f"{top}/" if top else "")
    }
    return Tree(images, {}, tree.left_out, tree.folders_left_out), top


def _images_of_tar(entry: tuple[str, AnyPath, int, int]) -> tuple[list[TarFile], collections.Counter[str]]:
    """The images of a tar, and how many other files there are of each kind."""
    _, path, start, end = entry
    images, left_out = [], collections.Counter[str]()
    for member in files_of(path, start, end):
        kind = why_left_out(member.name)
        if kind is None:
            images.append(member)
        else:
            left_out[kind] += 1
    return images, left_out


def _class_of(name: str) -> str:
    return re.sub(r"\.(tar|tar\.gz|tgz)$", "", os.path.basename(name))


def list_flat_tar(path: AnyPath, context: Context) -> Listing:
    """Lists a tar of images, whose labels are in a file of their own (context.labels).

    The file has one label per line in the order of the sorted names, or lines of name and label. Labels are class
    names, or indices from 0; ILSVRC's own numbering needs its devkit. A JSON file has a list of indices for each image
    instead, in the order of the sorted names; images of an empty list are left out.
    """
    if context.labels is None:
        raise UserError(f"{path} holds images without labels: name the file of their labels with --labels")
    (plain,) = plain_tars([path], context)
    images, left_out = _images_of_tar(("", plain, 0, plain.stat().st_size))
    images.sort(key=lambda member: member.name)
    if context.labels.endswith(".json"):
        return _list_with_several_labels(path, plain, images, left_out, context)
    lines = validation_labels(any_path(context.labels))
    _check_count(len(lines), len(images), path, context)
    if lines and len(lines[0]) > 1:
        by_name = {line[0]: line[-1] for line in lines}
        missing = [m.name for m in images if os.path.basename(m.name) not in by_name]
        if missing:
            raise UserError(f"{context.labels} has no label for {missing[0]} of {path}: add it")
        labels = [by_name[os.path.basename(m.name)] for m in images]
    else:
        labels = [line[0] for line in lines]
    builder = ListingBuilder()
    builder.left_out.update(left_out)
    builder.add_file("bytes", plain, shown=path)
    for image, label in zip(images, labels, strict=True):
        builder.add(image.name, [label], image.offset, image.size)
    return builder.finish(context.classes, context.labels)


def _check_count(labels: int, images: int, path: AnyPath, context: Context) -> None:
    if labels != images:
        raise UserError(f"{context.labels} has {labels:,} labels for the {images:,} images of {path}")


def _list_with_several_labels(
    path: AnyPath, plain: AnyPath, images: list[TarFile], left_out: collections.Counter[str], context: Context
) -> Listing:
    """A tar of images with the labels of a JSON file."""
    assert context.labels is not None  # the file
    lists = listed_labels(any_path(context.labels))
    _check_count(len(lists), len(images), path, context)
    builder = ListingBuilder()
    builder.multi_label = True
    builder.left_out.update(left_out)
    builder.add_file("bytes", plain, shown=path)
    for image, labels in zip(images, lists, strict=True):
        if labels:
            builder.add(image.name, [Label(str(index)) for index in labels], image.offset, image.size)
        else:
            builder.left_out["image without a label"] += 1
    context.describe(f"a tar of images with up to {max(map(len, lists), default=0)} labels each")
    return builder.finish(context.classes, context.labels)
