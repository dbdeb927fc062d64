"""Files and folders in object stores and on web servers, with the methods of pathlib.Path that data needs."""

import contextlib
import errno
import fnmatch
import glob
import io
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from fastvit_engine.data.shards.braces import expand_braces
from fastvit_engine.errors import UserError
from fastvit_engine.files import atomic_writer
from fastvit_engine.shown import public_url
from fastvit_engine.storage import remote_files
from fastvit_engine.storage.remote_files import ON_WEB_SERVERS

_BUFFER = 1 << 20  # bytes that a file asks for at once


class Size(NamedTuple):
    """What `stat` says of a remote file, under pathlib's name."""

    st_size: int


@dataclass
class _Folder:
    """What lies directly in a folder."""

    files: dict[str, int] = field(default_factory=dict)  # bytes by name
    folders: set[str] = field(default_factory=set)


class _Tree:
    """Everything below a URL of an object store, listed once when it is first asked for."""

    def __init__(self, root: str) -> None:
        self.root = root

    @cached_property
    def folders(self) -> dict[str, _Folder]:
        """By path below the root, "" for the root itself; empty if nothing is there."""
        found: dict[str, _Folder] = {}
        if self.root.startswith(ON_WEB_SERVERS):
            return found  # which do not list their files
        for path, size in remote_files.list_files(self.root):
            below, _, name = path.rpartition("/")
            self._folder(found, below)
            found[below].files[name] = size
        for folder in found.values():  # some tools mark a folder by an empty object of its name
            folder.files = {name: size for name, size in folder.files.items() if name not in folder.folders}
        return found

    def _folder(self, found: dict[str, _Folder], path: str) -> None:
        if path in found:
            return
        found[path] = _Folder()
        if path:
            above, _, name = path.rpartition("/")
            self._folder(found, above)
            found[above].folders.add(name)


@dataclass(frozen=True)
class RemotePath:
    """A URL, as a path. Paths that were made from each other with "/" share one listing.

    A folder is there if an object is in it. Web servers do not list files: there, nothing is a folder. It is no
    os.PathLike, so that what takes it for a local path fails. Methods raise OSError, FileNotFoundError too, as those of
    pathlib.Path do; UserError if the store refuses.
    """

    url: str
    tree: _Tree = field(compare=False, repr=False)

    @classmethod
    def of(cls, url: str) -> "RemotePath":
        url = url if "?" in url else url.rstrip("/")
        return cls(url, _Tree(url))

    def __str__(self) -> str:
        return self.url

    def __lt__(self, other: "RemotePath") -> bool:
        return self.url < other.url

    def __truediv__(self, name: "str | Path") -> "RemotePath":
        return RemotePath(f"{self.url}/{name}", self.tree) if str(name) not in ("", ".") else self

    @property
    def name(self) -> str:
        return public_url(self.url).rpartition("/")[2]

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> "RemotePath":
        above = public_url(self.url).rpartition("/")[0]
        return self if above.endswith("/") or not above else self._beside(above)

    @property
    def parents(self) -> list["RemotePath"]:
        found, path = [], self
        while path.parent != path:
            path = path.parent
            found.append(path)
        return found

    def _beside(self, url: str) -> "RemotePath":
        inside = url == self.tree.root or url.startswith(f"{self.tree.root}/")
        return RemotePath(url, self.tree if inside else _Tree(url))

    def with_name(self, name: str) -> "RemotePath":
        return self._beside(f"{self.parent}/{name}")

    def resolve(self) -> "RemotePath":
        return self

    def expanduser(self) -> "RemotePath":
        return self

    def is_dir(self) -> bool:
        return self._below() in self.tree.folders

    def is_file(self) -> bool:
        if self.tree.folders:
            above, _, name = self._below().rpartition("/")
            return name in self.tree.folders.get(above, _Folder()).files
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def exists(self) -> bool:
        return self.is_dir() or self.is_file()

    def iterdir(self) -> Iterator["RemotePath"]:
        if not self.is_dir():
            raise FileNotFoundError(f"there is no folder {self}")
        folder = self.tree.folders[self._below()]
        return (self / name for name in [*folder.folders, *folder.files])

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """What in this folder matches a pattern without "/"."""
        found = self.iterdir() if self.is_dir() else iter(())
        return (path for path in found if fnmatch.fnmatchcase(path.name, pattern))

    def files_below(self) -> Iterator[tuple[str, list[str], list[str]]]:
        """(path relative to this folder, names of the folders in it, names of the files in it), as os.walk has them."""
        start = self._below()
        for path, folder in sorted(self.tree.folders.items()):
            if path == start or path.startswith(f"{start}/" if start else ""):
                yield path[len(start) :].lstrip("/"), sorted(folder.folders), sorted(folder.files)

    def stat(self) -> Size:
        above, _, name = self._below().rpartition("/")
        known = self.tree.__dict__.get("folders", {}).get(above)
        if known is not None and name in known.files:
            return Size(known.files[name])
        version = remote_files.version_of(self.url)
        if version is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url)
        return Size(version.size)

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file for reading, in any order."""
        if mode != "rb":
            raise ValueError(f"a remote file is not opened as {mode!r}")
        return cast(BinaryIO, io.BufferedReader(_RemoteFile(self.url, self.stat().st_size), _BUFFER))

    def read_bytes(self) -> bytes:
        return remote_files.read(self.url)

    def _below(self) -> str:
        """The path below the root of the listing."""
        return self.url[len(self.tree.root) :].lstrip("/")


AnyPath = Path | RemotePath


def any_path(text: str) -> AnyPath:
    """A path on this machine ("~" is expanded, and file:// left out) or a URL."""
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return RemotePath.of(text) if "://" in text else Path(text).expanduser()


def is_remote(text: str) -> bool:
    """Whether a path is a URL of another machine."""
    return "://" in text and not text.startswith("file://")


def is_pattern(text: str) -> bool:
    """Whether a path has wildcards or braces; on web servers, "?" begins a query and "[" is an address."""
    return any(character in text for character in ("*{" if text.startswith(ON_WEB_SERVERS) else "*?[{"))


def matching_files(pattern: AnyPath) -> list[AnyPath]:
    """The sorted files that a glob or brace pattern names; a pattern that matches nothing is itself among them.

    Raises UserError if its braces cannot be expanded.
    """
    try:
        parts = expand_braces(str(pattern))
    except ValueError as error:
        raise UserError(f"the braces of {str(pattern)[:500]!r} cannot be expanded: {error}") from error
    found: list[AnyPath] = []
    for part in parts:
        if not is_remote(part):
            found += map(Path, glob.glob(part) or [part])
        elif glob.has_magic(part) and not part.startswith(ON_WEB_SERVERS):
            found += map(RemotePath.of, remote_files.glob_files(part) or [part])
        else:
            found.append(RemotePath.of(part))
    return sorted(found, key=lambda file: str(file).split("/"))


def common_folder(files: list[AnyPath]) -> AnyPath:
    """The innermost folder that all of some files are in."""
    if all(isinstance(file, Path) for file in files):
        return Path(os.path.commonpath([str(file.parent) for file in files]))
    folders = [str(file.parent).split("/") for file in files]
    common = os.path.commonprefix(folders)  # of lists, element by element
    if len(common) < 4 and not (len(common) == 3 and common[2]):
        raise UserError(f"{files[0]} and {files[-1]} are in different stores: name files of one")
    return RemotePath.of("/".join(common))


def names_in(folder: AnyPath, files: list[AnyPath]) -> list[str]:
    """The paths of files relative to a folder around them."""
    if isinstance(folder, Path):
        return [str(Path(str(file)).relative_to(folder)) for file in files]
    return [str(file).removeprefix(f"{folder}/") for file in files]


@contextlib.contextmanager
def new_file(path: AnyPath) -> Iterator[BinaryIO]:
    """A file that becomes `path` when the block ends, and disappears if the block raises: whole or not at all."""
    if isinstance(path, Path):
        with atomic_writer(path) as file:
            yield file
        return
    check_writable(path.url)
    with tempfile.TemporaryFile(prefix="fastvit-upload-") as file:
        yield cast(BinaryIO, file)
        remote_files.write(path.url, cast(BinaryIO, file))


def write_file(path: AnyPath, content: bytes) -> None:
    """Replaces a file, whole or not at all."""
    with new_file(path) as file:
        file.write(content)


def check_writable(url: str) -> None:
    """Raises UserError for what no engine writes to."""
    if url.startswith(ON_WEB_SERVERS):
        raise UserError(
            f"{public_url(url)} is on a web server, which is only read: name a local path or an object store (s3://, "
            "gs://, az://), or write to a local path and copy it there"
        )


class _RemoteFile(io.RawIOBase):
    """A file on a server, each read of which is a request."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._at = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if self._at >= end:
            return 0
        data = remote_files.read(self._url, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
