"""Tar files read by offset: class tars (ImageNet's training images), and flat ones with a file of labels."""

import contextlib
import gzip
import io
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastvit_engine.data.build.parallel import Counter, ordered_map, parallel_map
from fastvit_engine.data.build.sources.context import Context, is_image
from fastvit_engine.data.build.sources.devkit import validation_labels
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder
from fastvit_engine.data.stream.sequential import StrictTarInfo
from fastvit_engine.errors import UserError


class Member(NamedTuple):
    name: str
    header: int  # where the member begins in the file
    offset: int  # where its content begins
    size: int


def members(path: Path | str, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The files in the tar that bytes [start, end) of a file hold, by their headers alone.

    UserError where they are not a whole tar, and nothing but it.
    """
    try:
        with open(path, "rb") as file:
            end = os.fstat(file.fileno()).st_size if end is None else end
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo) as tar:
                while (member := tar.next()) is not None:
                    if member.isreg():
                        yield Member(member.name, member.offset, member.offset_data, member.size)
                    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
                if tar.offset > end:
                    raise tarfile.ReadError("it is cut off")
                # A zeroed header looks like the end: nothing but padding may follow the real one.
                file.seek(tar.offset)
                while block := file.read(min(end - file.tell(), 2**20)):
                    if block.strip(b"\0"):
                        raise tarfile.ReadError("data after the end of the archive")
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the tar {path} is damaged or unreadable ({reason}): copy or make it again") from error


def read_members(content: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files in whole members of a tar; ValueError where they are not that."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content + bytes(3 * tarfile.BLOCKSIZE)), mode="r:") as tar:
            for member in tar:
                if member.isreg():
                    file = tar.extractfile(member)
                    assert file is not None
                    yield member.name, file.read()
    except tarfile.TarError as error:
        raise ValueError(str(error)) from error


def is_tar_name(name: str) -> bool:
    return name.endswith((".tar", ".tar.gz", ".tgz"))


def first_members(path: Path, count: int) -> list[str]:
    """The names of the first files in a tar, gzipped or not; UserError where it is no tar."""
    names: list[str] = []
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if member.isreg():
                    names.append(member.name)
                if len(names) == count or member.name.endswith(".tar"):  # which are large, and say enough
                    break
    except (OSError, EOFError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the tar {path} is damaged or unreadable ({reason}): copy or make it again") from error
    return names


def plain_tars(paths: list[Path], context: Context) -> list[Path]:
    """For each path itself, or where it is gzipped (which its name need not say) a plain copy in the scratch folder."""
    plain = [context.scratch_file(path, ".tar") if _is_gzipped(path) else path for path in paths]
    gzipped = [(path, copy) for path, copy in zip(paths, plain, strict=True) if copy != path and not copy.exists()]
    if gzipped:
        names = str(gzipped[0][0]) if len(gzipped) == 1 else f"{len(gzipped)} gzipped tars"
        context.say(f"decompressing {names} into {context.scratch}, since images are read by their offsets")
        context.progress.start("decompressing", len(gzipped), "tars")
        done = Counter()

        def decompress(pair: tuple[Path, Path]) -> None:
            path, copy = pair
            with context.writing(copy) as target, gzip.open(path, "rb") as packed:
                try:
                    shutil.copyfileobj(packed, target, 2**20)
                except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                    raise UserError(f"{path} is damaged ({error}): copy or download it again") from error
            done.add()

        for _ in parallel_map(
            decompress, gzipped, workers=context.workers, while_waiting=lambda: context.progress.update(done.value)
        ):
            pass
    return plain


def _is_gzipped(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable") from error


def list_class_tars(path: Path, context: Context) -> Listing:
    """A folder of tars or a tar of tars, each named by its class and holding the images of the class."""
    tars: list[tuple[str, Path, int, int]] = []  # class, file, where its tar begins and ends
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if is_tar_name(file.name))
        for file, plain in zip(files, plain_tars(files, context), strict=True):
            tars.append((_class_of(file.name), plain, 0, plain.stat().st_size))
    else:
        (plain,) = plain_tars([path], context)
        for member in members(plain):
            if member.name.endswith(".tar"):
                tars.append((_class_of(member.name), plain, member.offset, member.offset + member.size))
    tars.sort(key=lambda entry: entry[0])
    classes = [name for name, *_ in tars]

    builder = ListingBuilder()
    context.progress.start("listing", len(tars), "class tars")
    with contextlib.closing(ordered_map(_images_of_tar, tars, workers=context.workers)) as results:
        for done, ((name, file, _, _), images) in enumerate(zip(tars, results, strict=True)):
            if not images:
                raise UserError(f"the class tar {name}.tar in {path} holds no image: remove it or download it again")
            builder.add_file("bytes", file)
            for image in images:
                builder.add(image.name, [name], image.offset, image.size)
            context.progress.update(done + 1)
    return builder.finish(context.classes or classes, str(path))


def _images_of_tar(entry: tuple[str, Path, int, int]) -> list[Member]:
    _, path, start, end = entry
    return [member for member in members(path, start, end) if is_image(member.name)]


def _class_of(name: str) -> str:
    return re.sub(r"\.(tar|tar\.gz|tgz)$", "", os.path.basename(name))


def list_flat_tar(path: Path, context: Context) -> Listing:
    """A tar of images, with a file of labels (context.labels): one label a line in the order of the sorted names, or
    lines of name and label. Labels are class names, or indices from 0; ILSVRC's own numbering needs its devkit.
    """
    if context.labels is None:
        raise UserError(f"{path} holds images without labels: name the file of their labels with --labels")
    (plain,) = plain_tars([path], context)
    images = sorted((member for member in members(plain) if is_image(member.name)), key=lambda member: member.name)
    lines = validation_labels(Path(context.labels).expanduser())
    if len(lines) != len(images):
        raise UserError(f"{context.labels} has {len(lines):,} labels for the {len(images):,} images of {path}")
    if lines and len(lines[0]) > 1:
        by_name = {line[0]: line[-1] for line in lines}
        missing = [m.name for m in images if os.path.basename(m.name) not in by_name]
        if missing:
            raise UserError(f"{context.labels} has no label for {missing[0]} of {path}: add it")
        labels = [by_name[os.path.basename(m.name)] for m in images]
    else:
        labels = [line[0] for line in lines]
    builder = ListingBuilder()
    builder.add_file("bytes", plain)
    for image, label in zip(images, labels, strict=True):
        builder.add(image.name, [label], image.offset, image.size)
    return builder.finish(context.classes, context.labels)
