"""The shard cache: a folder of whole shards that all processes of a node share.

    NAME.shard        a whole shard; its modification time is its last use
    NAME.ID.part      a shard that a process is downloading: of full size from the start, to reserve its space, and
                      locked by that process, so that others can tell it from what a killed process left behind
    lock              held while the folder is listed, a download begins, or a finished shard is renamed

The locks are the kernel's (flock): they end with the process that holds them. Readers take none. A shard that is
evicted during a read stays readable until it is closed, after that read: so the cache takes no more space than the
files in the folder. A download is locked and of full size while it grows, so it does not use
`files.atomic_writer`.
"""

import errno
import fcntl
import hashlib
import os
import re
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fastvit_engine.errors import UserError
from fastvit_engine.storage.local import read_exactly
from fastvit_engine.trusted_folders import trusted_folder

IDLE_S = 30.0  # a shard read or planned within this time is in use, and not evicted
TOUCH_S = 1.0  # last use is noted this exactly
LOCK_TIMEOUT_S = 10.0
OURS = re.compile(r"(?P<name>.+\.[0-9a-f]{16})\.(?:shard|[0-9a-f]{32}\.(?P<part>part))")


@cache
def cache_name(url: str, size: int) -> str:
    """Returns a file name for the shard: readable, and unique for its URL and size."""
    base = re.sub(r"[^\w.-]", "_", url.partition("?")[0].rpartition("/")[2])[:100]
    return f"{base}.{hashlib.sha256(f'{url} {size}'.encode()).hexdigest()[:16]}"


class Busy(NamedTuple):
    """Another process or thread is downloading the shard."""

    part: str

    def is_over(self) -> bool:
        return not _is_locked(self.part)


class Present(NamedTuple):
    """The shard is in the cache."""


class NoRoom(NamedTuple):
    """The shard does not fit next to the shards in use."""


class ShardCache:
    """Whole shards in a folder, evicted by least recent use. OSError from its methods: the folder cannot be used."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.folder, self.limit = folder, limit

    def prepare(self) -> None:
        """Creates the folder; raises UserError if it cannot be used, or if others may put shards there."""
        try:
            trusted_folder(self.folder, "data.cache")
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise UserError(
                f"the shard cache folder {self.folder} cannot be used ({error.strerror or error}): "
                "make it writable, or choose a folder on a local disk"
            ) from error

    def read(self, name: str, size: int, offset: int, length: int) -> bytes | None:
        """Returns `length` bytes of a cached shard from `offset` on; None if it is not in the cache."""
        fd = self._open(name, size)
        if fd is None:
            return None
        try:
            data = read_exactly(fd, offset, length)
        finally:
            os.close(fd)
        return data if len(data) == length else None

    def touch(self, name: str, size: int) -> bool:
        """Marks the shard as in use; returns False if it is not in the cache."""
        fd = self._open(name, size)
        if fd is not None:
            os.close(fd)
        return fd is not None

    def _open(self, name: str, size: int) -> int | None:
        path = self.folder / f"{name}.shard"
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        status = os.fstat(fd)
        if status.st_size != size:
            os.close(fd)
            path.unlink(missing_ok=True)
            return None
        if time.time() - status.st_mtime > TOUCH_S:
            with suppress(OSError):  # not ours, or evicted just now
                os.utime(fd)
        return fd

    def begin(self, name: str, size: int, keep: Collection[str]) -> "Download | Present | Busy | NoRoom":
        """Begins the download of a shard unless it is cached or in progress; evicts others, but none in `keep`."""
        with self._locked():
            used = 0
            evictable: list[tuple[float, int, str]] = []  # (last use, bytes, path)
            for entry in os.scandir(self.folder):
                match = OURS.fullmatch(entry.name)
                if match is None:
                    continue
                try:
                    status = entry.stat()
                except FileNotFoundError:  # a reader found that it is not whole
                    continue
                if match["part"] and not _is_locked(entry.path):
                    os.unlink(entry.path)  # whoever wrote it was killed
                    continue
                if match["name"] == name:
                    if match["part"]:
                        return Busy(entry.path)
                    if status.st_size == size:
                        return Present()
                    Path(entry.path).unlink(missing_ok=True)
                    continue
                used += status.st_size
                if not match["part"] and match["name"] not in keep and time.time() - status.st_mtime >= IDLE_S:
                    evictable.append((status.st_mtime, status.st_size, entry.path))
            if self.limit is not None:
                excess = used + size - self.limit
                if excess > sum(bytes_ for _, bytes_, _ in evictable):
                    return NoRoom()
                for _, bytes_, path in sorted(evictable):
                    if excess <= 0:
                        break
                    Path(path).unlink(missing_ok=True)
                    excess -= bytes_
            return Download(self, name, size)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with _inherited_by_no_child(fd):
                until = time.monotonic() + LOCK_TIMEOUT_S
                while not _try_lock(fd, fcntl.LOCK_EX):
                    if time.monotonic() > until:
                        raise OSError(errno.ETIMEDOUT, "another process holds its lock and does not release it")
                    time.sleep(0.002)
                yield
                fcntl.flock(fd, fcntl.LOCK_UN)  # also for a child that was forked meanwhile
        finally:
            os.close(fd)


class Download:
    """A shard that is being downloaded into the cache. End it with `publish` or `discard`."""

    def __init__(self, shards: ShardCache, name: str, size: int) -> None:
        self._shards = shards
        self._part = shards.folder / f"{name}.{uuid.uuid4().hex}.part"
        self._path = shards.folder / f"{name}.shard"
        self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _held.add(self._fd)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(self._fd, size)
        except BaseException:
            self.discard()
            raise

    def write(self, position: int, chunk: bytes | memoryview) -> None:
        chunk = memoryview(chunk)
        while chunk:
            written = os.pwrite(self._fd, chunk, position)
            position, chunk = position + written, chunk[written:]

    def publish(self) -> None:
        os.fsync(self._fd)
        with self._shards._locked():
            os.replace(self._part, self._path)
        self._close()

    def discard(self) -> None:
        self._part.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # also for a child that was forked meanwhile
        _held.discard(self._fd)
        os.close(self._fd)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(path: str) -> bool:
    """Whether the process that writes this file is alive; False if the file is gone."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(fd, fcntl.LOCK_SH)  # shared: two that look at once must not take each other for a writer
    finally:
        os.close(fd)


# A lock lasts until the last copy of its descriptor is closed, and a forked child has copies: were they left open, the
# lock of a killed process would live on in its children.
_held: set[int] = set()


@contextmanager
def _inherited_by_no_child(fd: int) -> Iterator[None]:
    _held.add(fd)
    try:
        yield
    finally:
        _held.discard(fd)


def _close_inherited() -> None:
    for fd in _held:
        with suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)
