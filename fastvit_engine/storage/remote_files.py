"""Whole files on servers: listed, read, written and removed. Shards that are read by position are in `ShardStorage`.

All functions raise UserError, in one sentence that names the file, if a store refuses or does not answer.
"""

import errno
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple, TypeVar

from fastvit_engine.errors import UserError
from fastvit_engine.shown import public_url
from fastvit_engine.storage.remote import TryPolicy, describe, stream_bytes
from fastvit_engine.storage.source import AttemptFailed, Exists, Missing, Refused
from fastvit_engine.storage.stores import ObjectInfo, open_store

ON_WEB_SERVERS = ("http://", "https://")
_POLICY = TryPolicy(retries=10, timeout=30.0, patience=300.0)
_AT_ONCE = 2**26  # bytes of a file that is written with one request
_CHUNK = 2**23  # bytes
T = TypeVar("T")


class Version(NamedTuple):
    """What a server says of a file without sending it."""

    size: int  # bytes
    tag: str  # changes when the file does


def list_files(url: str) -> Iterator[tuple[str, int]]:
    """(path below the folder, bytes) of all files in a folder of an object store and in the folders in it.

    There are none in a folder that does not exist.
    """
    store, folder = open_store(url)
    start = len(folder) + 1 if folder else 0

    def found() -> list[ObjectInfo]:
        return list(store.list_all(folder))

    try:
        infos = _call(url, "listed", found)
    except FileNotFoundError:
        return
    for info in infos:
        yield info.key[start:], info.size


def glob_files(pattern: str) -> list[str]:
    """The sorted URLs of the files in an object store that match; "*", "?" and "[...]" match no "/"."""
    store, key = open_store(pattern)
    root = pattern.rstrip("/").removesuffix(key)  # "s3://bucket/"
    try:
        return [root + found for found in _call(pattern, "listed", lambda: store.glob(key))]
    except FileNotFoundError:
        return []


def version_of(url: str) -> Version | None:
    """Bytes and tag of a file, None if an object store does not have it."""
    if url.startswith(ON_WEB_SERVERS):
        return Version(*describe(url, _POLICY))
    store, key = open_store(url)
    try:
        info = _call(url, "read", lambda: store.head(key))
    except FileNotFoundError:
        return None
    return Version(info.size, info.version)


def read(url: str, start: int = 0, stop: int | None = None) -> bytes:
    """The bytes [start, stop) of a file. Raises FileNotFoundError if an object store does not have it."""
    if url.startswith(ON_WEB_SERVERS):
        return b"".join(stream_bytes(url, _POLICY))[start:stop]
    store, key = open_store(url)
    return _call(url, "read", lambda: store.read(key, start, stop))


def write(url: str, content: bytes | BinaryIO, *, create: bool = False) -> None:
    """Replaces a file, whole or not at all, by these bytes or by an open file from its beginning to its end.

    With `create`, raises FileExistsError if the file exists.
    """
    store, key = open_store(url)
    if isinstance(content, bytes):
        small: bytes | None = content
    else:
        size = content.seek(0, os.SEEK_END)
        content.seek(0)
        small = content.read() if size <= _AT_ONCE else None

    def put() -> None:
        if small is not None:
            store.write(key, small, create=create)
            return
        assert not isinstance(content, bytes)
        if create and store.exists(key):  # which no upload in parts tells
            raise Exists
        content.seek(0)
        store.write_stream(key, iter(lambda: content.read(_CHUNK), b""))

    try:
        _call(url, "written", put)
    except FileNotFoundError as error:
        raise UserError(f"{public_url(url)} cannot be written: there is no such bucket; correct its name") from error


def delete(url: str) -> None:
    """Removes a file, if it exists."""
    store, key = open_store(url)
    try:
        _call(url, "removed", lambda: store.delete(key))
    except FileNotFoundError:
        return


def _call(url: str, done: str, call: Callable[[], T]) -> T:
    """Calls a method of a store, which tries again by itself. `done` says what cannot be done."""
    try:
        return call()
    except Missing as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
    except Exists as error:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
    except Refused as error:
        raise UserError(
            f"{public_url(url)} cannot be {done} ({error}): check its name and your access to it"
        ) from error
    except AttemptFailed as error:
        raise UserError(
            f"{public_url(url)} cannot be {done} ({error}): check the network and the store, and run the same command "
            "again"
        ) from error
