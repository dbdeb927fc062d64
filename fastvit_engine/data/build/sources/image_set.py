"""The images of a data set by their file names: in the archive that it comes in, or in the folder unpacked from it."""

import lzma
import os
import zlib
from dataclasses import dataclass, field

from fastvit_engine.data.build.sources.context import Context, why_left_out
from fastvit_engine.data.build.sources.listing import ListingBuilder
from fastvit_engine.data.build.sources.tars import TarFile, files_of, plain_tars
from fastvit_engine.data.shards.archive import open_forward
from fastvit_engine.data.shards.remote_path import AnyPath
from fastvit_engine.data.shards.sample import is_macos_resource
from fastvit_engine.data.shards.tar import TarError, iterate_members
from fastvit_engine.errors import UserError
from fastvit_engine.shown import brief
from fastvit_engine.storage.source import one_line

_LARGEST = 1 << 24  # bytes of a file that describes images; the real ones have less than 1 MB


@dataclass
class ImageSet:
    """Images that other files tell the labels of."""

    builder: ListingBuilder
    where: AnyPath  # the folder or the archive
    file: int  # index into the builder's files
    images: dict[str, TarFile | None]  # by file name; None: in the folder
    used: set[str] = field(default_factory=set)

    def add(self, name: str, label: str) -> None:
        """Adds an image to the listing, as a faulty one if it is not there. Raises UserError if it has been added."""
        if name in self.used:
            raise UserError(
                f"{brief(name)} of {self.where} is listed twice: download the files that list the images again"
            )
        self.used.add(name)
        if name not in self.images:
            self.builder.add_faulty(name, "is missing", file=self.file)
            return
        member = self.images[name]
        offset, size = (0, 0) if member is None else (member.offset, member.size)
        self.builder.add(name, [label], offset, size, file=self.file)

    def leave_out(self, name: str, why: str) -> None:
        """Counts an image that is listed and not used."""
        if name in self.images:
            self.used.add(name)
            self.builder.left_out[f"image {why}"] += 1

    def finish(self) -> None:
        """Counts the images that nothing lists."""
        if unused := len(self.images.keys() - self.used):
            self.builder.left_out["image that no list names"] += unused


def open_images(path: AnyPath, folder: str, archive: str, builder: ListingBuilder, context: Context) -> ImageSet:
    """The images of path/folder if it is there, otherwise those in the folder of that name of the tar path/archive.

    Raises UserError if neither is there, or the tar is damaged.
    """
    if (path / folder).is_dir():
        if (path / archive).is_file():
            context.left_out.append(f"{archive}, since {folder}/ is there")
        names = _in_folder(path / folder, builder)
        return ImageSet(builder, path / folder, builder.add_file("path", path / folder), dict.fromkeys(names))
    _check_is_there(path, folder, archive)
    (plain,) = plain_tars([path / archive], context)
    members: dict[str, TarFile | None] = {}
    for member in files_of(plain):
        parts = os.path.normpath(member.name).split("/")
        kind = why_left_out(parts[-1]) if parts[-2:-1] == [folder] else f"file outside of {folder}/"
        if kind is None:
            members[parts[-1]] = member
        else:
            builder.left_out["macOS resource file" if is_macos_resource(member.name) else kind] += 1
    return ImageSet(builder, path / archive, builder.add_file("bytes", plain, shown=path / archive), members)


def _in_folder(folder: AnyPath, builder: ListingBuilder) -> list[str]:
    names = []
    try:
        for file in folder.iterdir():
            if file.is_dir():
                builder.left_out["folder"] += 1
            elif (kind := why_left_out(file.name)) is None:
                names.append(file.name)
            else:
                builder.left_out[kind] += 1
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read ({error.strerror}): make it readable") from error
    return names


def take_splits(names: list[str], path: AnyPath, context: Context) -> list[str]:
    """The splits of a data set that --leave-out does not name; their images, not they, are to be counted."""
    counts = context.counts.copy()
    taken = context.take(names, path, "split")
    context.counts = counts
    return taken


def find_texts(path: AnyPath, folder: str, archive: str, names: list[str]) -> dict[str, list[str] | None]:
    """The lines of some text files of path/folder if that is there, otherwise of the tar path/archive.

    Blank lines and comments (#) are left out. A file that is missing is None. Raises UserError if neither folder nor
    archive is there, or a file cannot be read.
    """
    inside = (path / folder).is_dir()
    if not inside:
        _check_is_there(path, folder, archive)
    where = path / folder if inside else path / archive
    found = {name: _read(where / name) for name in names} if inside else _members(where, folder, names)
    return {name: None if content is None else _lines(content, f"{name} of {where}") for name, content in found.items()}


def _lines(content: bytes, where: str) -> list[str]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not text ({error}): download it again") from error
    return [line for entry in text.splitlines() if (line := entry.strip()) and not line.startswith("#")]


def read_file(path: AnyPath) -> bytes:
    """The content of a small file that describes images. Raises UserError if it is missing, unreadable or large."""
    content = _read(path)
    if content is None:
        raise UserError(f"{path} is missing: download it, and put it there")
    return content


def _read(path: AnyPath) -> bytes | None:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or one_line(error)}): make it readable") from error
    if len(content) > _LARGEST:
        raise UserError(f"{path} has more than {_LARGEST:,} bytes, which no such file has: download it again")
    return content


def _members(archive: AnyPath, folder: str, names: list[str]) -> dict[str, bytes | None]:
    """The content of some files that are directly in a folder of a tar, compressed or not; None for those missing."""
    found: dict[str, bytes | None] = dict.fromkeys(names)
    try:
        with open_forward(str(archive)) as (read, size):
            for member in iterate_members(read, size):
                parts = os.path.normpath(member.name).split("/")
                if member.is_file and parts[-2:-1] == [folder] and parts[-1] in found:
                    if member.size > _LARGEST:
                        raise TarError(f"has a {parts[-1]} of {member.size:,} bytes", member.start)
                    found[parts[-1]] = read(member.data, member.size)
                    if all(content is not None for content in found.values()):
                        break
    except (OSError, EOFError, TarError, zlib.error, lzma.LZMAError) as error:
        reason = f"it {error}" if isinstance(error, TarError) else one_line(error)
        raise UserError(f"{archive} cannot be read ({reason}): download it again") from error
    return found


def _check_is_there(path: AnyPath, folder: str, archive: str) -> None:
    if not (path / archive).is_file():
        raise UserError(f"{path} has neither {archive} nor the folder {folder} from it: download it, and put it there")
