"""Shards on a mounted file system."""

import errno
import os
import resource
import threading
from collections import OrderedDict

from fastvit_engine.errors import UserError
from fastvit_engine.storage.errors import StaleIndex

MOST_OPEN = 512  # files; at most half of what the process may open


def local_path(url: str) -> str | None:
    """Returns the path on this machine that a URL or plain path names, None if it is remote."""
    if url.startswith("file://"):
        return url.removeprefix("file://")
    return None if "://" in url or url.startswith("pipe:") else os.path.expanduser(url)


def read_exactly(fd: int, offset: int, length: int) -> bytes:
    """Returns `length` bytes of a file, fewer if it ends before."""
    chunks: list[bytes] = []
    while length > 0 and (chunk := os.pread(fd, length, offset)):  # one call gives 2 GiB at most
        chunks.append(chunk)
        offset, length = offset + len(chunk), length - len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


class LocalFiles:
    """Reads files by position and keeps the most recently used of them open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _File] = OrderedDict()
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_open = MOST_OPEN if limit == resource.RLIM_INFINITY else min(MOST_OPEN, limit // 2)

    def read(self, path: str, size: int, offset: int, length: int) -> bytes:
        """Raises UserError if the file is gone, does not have `size` bytes, or cannot be read."""
        try:
            try:
                data = self._file(path, size).read(offset, length)
            except OSError as error:
                if error.errno != errno.ESTALE:  # a network file system has lost track of the open file
                    raise
                with self._lock:
                    self._open.pop(path, None)
                data = self._file(path, size).read(offset, length)
        except FileNotFoundError as error:
            raise UserError(f"shard {path} does not exist: copy it there, or correct the pattern") from error
        except OSError as error:
            raise UserError(f"shard {path} cannot be read ({error.strerror}): make it readable, or copy it") from error
        if len(data) < length:
            raise StaleIndex(path, f"was cut short while it was read: it should have {size} bytes")
        return data

    def _file(self, path: str, size: int) -> "_File":
        with self._lock:
            file = self._open.get(path)
            if file is None:
                file = _File(path)
                found = os.fstat(file.fd).st_size
                if found != size:
                    raise StaleIndex(path, f"has {found} bytes instead of {size}")
                self._open[path] = file
            self._open.move_to_end(path)
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)
            return file


class _File:
    """An open file, closed when its last reader is done: never while another thread reads."""

    def __init__(self, path: str) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY)

    def read(self, offset: int, length: int) -> bytes:
        return read_exactly(self.fd, offset, length)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
