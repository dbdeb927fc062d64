"""Opens shards: files, URLs and pipes, plain or compressed, by position or only forward."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, BinaryIO, NamedTuple, cast

from webdataset.gopen import gopen

from fastvit_engine.data.shards.names import is_local
from fastvit_engine.data.shards.sample import Ignored, Sample, read_samples
from fastvit_engine.data.shards.tar import ReadAt, TarError, windowed
from fastvit_engine.errors import UserError
from fastvit_engine.storage import ShardStorage
from fastvit_engine.storage.remote import TryPolicy, describe, stream_bytes

_WINDOW = 1 << 14  # bytes that are read at once when walking over headers
_REMOTE_WINDOW = 1 << 22  # a request for each header would take longer than for all of the shard
_PIECE = 1 << 24  # bytes that are asked of a pipe at once
_TRIES = TryPolicy(retries=10, timeout=30.0, patience=300.0)
_ONLY_WEBDATASET = ("pipe:", "ais://", "htgs://", "scp://", "sftp://", "ftps://")  # what `storage` does not read

_Decompress = Callable[[BinaryIO], BinaryIO]


def _from_xz(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, lzma.LZMAFile(file))


_COMPRESSIONS: dict[bytes, tuple[str, _Decompress]] = {  # by the first bytes
    b"\x1f\x8b": ("gzipped", lambda file: cast(BinaryIO, gzip.GzipFile(fileobj=file))),
    b"BZh": ("compressed with bzip2", lambda file: cast(BinaryIO, bz2.BZ2File(file))),
    b"\xfd7zXZ\0": ("compressed with xz", _from_xz),
}
_MAGIC_BYTES = max(map(len, _COMPRESSIONS))


class DamagedShard(UserError):
    """A shard that is not an archive of whole samples."""


class Archive(NamedTuple):
    """A shard as bytes by position."""

    read: ReadAt
    size: int  # bytes
    stamp: int  # of this version: time of the last change in ns, or a hash of a remote file's tag


def stamp_of_local(shard: str) -> tuple[int, int]:
    """Returns (bytes, time of the last change in ns)."""
    status = os.stat(shard)
    return status.st_size, status.st_mtime_ns


def stamp_of(shard: str) -> tuple[int, int]:
    """(bytes, stamp) of a path or URL. Raises OSError, or UserError if a server does not give them."""
    if is_local(shard):
        return stamp_of_local(shard)
    size, version = describe(shard, _TRIES)
    return size, stamp_of_tag(version)


def stamp_of_tag(tag: str) -> int:
    """The stamp of a version that a server knows by this tag."""
    return int.from_bytes(blake2b(tag.encode(), digest_size=8).digest(), "little")


@contextlib.contextmanager
def open_archive(shard: str) -> Iterator[Archive]:
    """A path or URL for reading in any order, as it is. Raises OSError, or UserError if it cannot be read."""
    size, stamp = stamp_of(shard)
    if is_local(shard):
        with open(shard, "rb", buffering=0) as file:
            yield Archive(windowed(lambda at, length: os.pread(file.fileno(), length, at), _WINDOW), size, stamp)
    else:
        storage = ShardStorage([shard], [size])

        def read(at: int, length: int) -> bytes:
            return storage.read(0, at, max(0, min(length, size - at)))

        yield Archive(windowed(read, _REMOTE_WINDOW), size, stamp)


def compression_of(start: bytes) -> str | None:
    """How a file is compressed that begins with these bytes; None if it is plain."""
    return next((name for magic, (name, _) in _COMPRESSIONS.items() if start.startswith(magic)), None)


@contextlib.contextmanager
def open_forward(shard: str) -> Iterator[tuple[ReadAt, int | None]]:
    """A path, URL or pipe for reading once from beginning to end, decompressed; and its bytes if they are known.

    Raises OSError, EOFError or an error of the decompressing library, now or while it is read.
    """
    with contextlib.ExitStack() as stack:
        size: int | None = None
        if shard.startswith(_ONLY_WEBDATASET):
            stream = stack.enter_context(contextlib.closing(gopen(shard)))
            file: io.BufferedReader[Any] = io.BufferedReader(_Raw(stream.read), _WINDOW)
        elif is_local(shard):
            file = stack.enter_context(open(shard, "rb"))
            size = os.fstat(file.fileno()).st_size
        else:
            chunks = stack.enter_context(contextlib.closing(stream_bytes(shard, _TRIES)))
            file = io.BufferedReader(_Raw(_next_of(chunks)), _WINDOW)
        start = file.peek(_MAGIC_BYTES)
        for magic, (_, decompress) in _COMPRESSIONS.items():
            if start.startswith(magic):
                yield _Forward(stack.enter_context(decompress(file))).read, None
                return
        yield _Forward(file).read, size


def read_shard(shard: str, ignored: Ignored | None = None) -> Iterator[Sample]:
    """Samples of a shard (path, URL or pipe; a tar, plain or compressed) in stored order.

    Files that belong to no sample are counted in `ignored`. Raises DamagedShard if the archive is truncated or damaged,
    or does not hold whole samples, and UserError if it cannot be read.
    """
    try:
        with open_forward(shard) as (read, size):
            yield from read_samples(read, size, shard, Ignored() if ignored is None else ignored)
    except (TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(
                f"shard {shard} cannot be read ({error.strerror}): correct its name, or make it readable"
            ) from error
        reason = f"it {error}" if isinstance(error, TarError) else str(error) or type(error).__name__
        raise DamagedShard(f"shard {shard} is damaged ({reason}): copy or make it again") from error


class _Forward:
    """`ReadAt` over a file that can only be read forward."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._begin, self._kept = 0, b""  # what was asked for last, which may be asked for again

    def read(self, at: int, length: int) -> bytes:
        if at < self._begin:
            raise ValueError(f"byte {at} is asked for after byte {self._begin}")
        end = self._begin + len(self._kept)
        while end < at and (passed := len(self._file.read(min(at - end, _PIECE)))):
            end += passed
        kept = self._kept[at - self._begin :]
        self._begin, self._kept = at, kept
        if len(kept) < length:
            self._kept += self._take(length - len(kept))
        return self._kept[:length]

    def _take(self, length: int) -> bytes:
        """`length` bytes, fewer at the end. In pieces: a length that is a lie must not reserve memory."""
        pieces = []
        while length and (piece := self._file.read(min(length, _PIECE))):
            pieces.append(piece)
            length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class _Raw(io.RawIOBase):
    """A file over a function that gives the next bytes, at most so many, and none at the end."""

    def __init__(self, read_next: Callable[[int], bytes]) -> None:
        self._read_next = read_next

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read_next(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _next_of(chunks: Iterator[bytes]) -> Callable[[int], bytes]:
    """The chunks' bytes, at most so many at a time; none at the end."""
    rest = memoryview(b"")

    def read_next(count: int) -> bytes:
        nonlocal rest
        if not rest:
            rest = memoryview(next(chunks, b""))
        data, rest = bytes(rest[:count]), rest[count:]
        return data

    return read_next
