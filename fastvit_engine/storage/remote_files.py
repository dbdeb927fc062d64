"""Whole files on servers: listed, read, written and removed. Shards that are read by position are in `ShardStorage`."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from fastvit_engine.errors import UserError
from fastvit_engine.shown import public_url
from fastvit_engine.storage.object_store import FINAL_ERRNOS, FINAL_ERRORS, one_line, require_package
from fastvit_engine.storage.remote import TryPolicy, describe, stream_bytes

ON_WEB_SERVERS = ("http://", "https://")
_POLICY = TryPolicy(retries=10, timeout=30.0, patience=300.0)
_PAUSES = (0.5, 2.0, 8.0)  # seconds before each further attempt, besides what the store's client does by itself
T = TypeVar("T")


class Version(NamedTuple):
    """What a store says of a file without sending it."""

    size: int  # bytes
    tag: str  # changes when the file does


def list_files(url: str) -> Iterator[tuple[str, int]]:
    """(path below the folder, bytes) of all files in a folder of an object store and in the folders in it.

    There are none in a folder that does not exist. Raises UserError as all functions here, if the store refuses.
    """
    fs, root = _open(url.rstrip("/"))

    def find() -> dict[str, Any]:
        fs.invalidate_cache()
        found: dict[str, Any] = fs.find(root, detail=True)
        return found

    try:
        found = _try(url, "listed", find)
    except FileNotFoundError:
        return
    for path, entry in found.items():
        if path.startswith(f"{root}/"):
            yield path[len(root) + 1 :], int(entry["size"])


def version_of(url: str) -> Version | None:
    """Bytes and tag of a file, None if it does not exist."""
    if not url.startswith(ON_WEB_SERVERS):
        fs, path = _open(url)
        fs.invalidate_cache()
        try:
            _try(url, "read", lambda: fs.info(path, refresh=True))
        except FileNotFoundError:
            return None
    return Version(*describe(url, _POLICY))


def read(url: str, start: int = 0, stop: int | None = None) -> bytes:
    """The bytes [start, stop) of a file. Raises FileNotFoundError if an object store does not have it."""
    if url.startswith(ON_WEB_SERVERS):
        return b"".join(stream_bytes(url, _POLICY))[start:stop]
    fs, path = _open(url)
    content: bytes = _try(url, "read", lambda: fs.cat_file(path, start=start or None, end=stop))
    return content


def write(url: str, content: bytes | BinaryIO) -> None:
    """Replaces a file, whole or not at all, by these bytes or by a file from its beginning to its end."""
    _put(url, content)


def create(url: str, content: bytes | BinaryIO) -> None:
    """Writes a file. Raises FileExistsError if it exists: of several writers at once, one succeeds."""
    _put(url, content, mode="create")


def delete(url: str) -> None:
    """Removes a file, if it exists."""
    fs, path = _open(url)
    try:
        _try(url, "removed", lambda: fs.rm_file(path))
    except FileNotFoundError:
        return


def _put(url: str, content: bytes | BinaryIO, **options: str) -> None:
    fs, path = _open(url)

    def put() -> None:
        if not isinstance(content, bytes):
            content.seek(0)
        fs.pipe_file(path, content if isinstance(content, bytes) else content.read(), **options)

    try:
        _try(url, "written", put)
    except FileNotFoundError as error:
        raise UserError(
            f"{public_url(url)} cannot be written (there is no such bucket): make it, or correct it"
        ) from error


def _open(url: str) -> tuple[AbstractFileSystem, str]:
    require_package(url)
    fs, path = url_to_fs(url)
    return fs, path


def _try(url: str, done: str, call: Callable[[], T]) -> T:
    """Calls a method of a store, a few times if the failure may pass. `done` says what cannot be done."""
    for pause in (*_PAUSES, None):
        try:
            return call()
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
        except FileExistsError:
            raise
        except Exception as error:  # each package has its own classes
            final = getattr(error, "errno", None) in FINAL_ERRNOS or type(error).__name__ in FINAL_ERRORS
            if final or pause is None or isinstance(error, PermissionError):
                raise UserError(
                    f"{public_url(url)} cannot be {done} ({one_line(error)}): check its name and your access to it"
                ) from error
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")
