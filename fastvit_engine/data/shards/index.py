"""The index of a dataset: where each sample of each shard begins, in one file that is mapped into memory.

    header     magic, version, number of samples, offset of the names, and a checksum of all but the starts
    starts     a number per sample: the block of 512 bytes of its first header; a sample ends where the next begins
    columns    a number or a few per shard: bytes, samples, time stamp, fingerprint, checksum of its starts, ...
    names      the shards, relative to the folder of the index if they are in it, and what the columns are

The starts of a shard are verified before they are used: all of them when the index is opened, or if there are very
many, those of each shard when its first sample is located. Version 1 had no checksum of the starts; there, those of a
shard must be in ascending order.

Making the index also checks the shards: damage that other readers of tars take for the end of an archive is an error
here, before training starts.
"""

import contextlib
import errno
import json
import os
import shlex
import struct
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastvit_engine.cores import cores_here
from fastvit_engine.data.shards.archive import open_archive, stamp_of
from fastvit_engine.data.shards.names import is_local
from fastvit_engine.data.shards.remote_path import AnyPath, RemotePath, check_writable, write_file
from fastvit_engine.data.shards.sample import Ignored
from fastvit_engine.data.shards.scan import NotSeekable, ShardRecord, WrongLabel, scan_shard
from fastvit_engine.data.shards.tar import BLOCK, TarError
from fastvit_engine.errors import UserError
from fastvit_engine.files import atomic_write, atomic_writer
from fastvit_engine.shown import public_url

INDEX_NAME = "shards.index"
INDEX_SUFFIX = ".index"
LABEL_KEY = "cls"  # where labels are unless data.label_key says otherwise

_MAGIC, _VERSION, _FIRST_VERSION = b"FVINDEX\0", 2, 1
_HEADER = struct.Struct("<8sIIQQQ16s")  # magic, version, 0, samples, offset and bytes of the names, checksum
_COLUMNS = {
    "sizes": "<u8",  # bytes
    "counts": "<u4",  # samples
    "ends": "<u4",  # block where the last sample ends
    "stamps": "<u8",  # of the file's version: time of change in ns, or a hash of a remote file's tag
    "fingerprints": "<u8",  # of names, positions and labels
    "unlabelled": "<u4",  # samples without a label
    "label_ends": "<u8",  # in the two columns below
    "labels": "<i8",
    "label_counts": "<u4",
    "start_checksums": "<u4",  # CRC-32
}
_VERIFIED_AT_ONCE = 1 << 26  # bytes of starts that an opened index verifies; more would delay a start
_WORTH_A_POOL = 64  # shards
_MOST_PROBLEMS = 10
_REPORT_EVERY = 5.0  # seconds


@dataclass(frozen=True, eq=False)
class Index:
    """Shards in a fixed order, and the extent of every sample in them; see `select` for some of them."""

    path: Path  # the file that is mapped: where it was made, or a copy of a remote one
    where: str  # the path or URL that people know it by
    label_key: str  # what `labels` were read from
    shards: list[str]  # paths or URLs
    sizes: NDArray[np.int64]
    counts: NDArray[np.int64]
    ends: NDArray[np.int64]
    stamps: NDArray[np.uint64]
    fingerprints: NDArray[np.uint64]
    unlabelled: NDArray[np.int64]
    first: NDArray[np.int64]  # number of each shard's first sample in `starts`
    starts: NDArray[np.uint32]  # mapped from the file
    label_ranges: NDArray[np.int64]  # [shards, 2]: of each shard in the next two
    labels: NDArray[np.int64]
    label_counts: NDArray[np.int64]
    ignored: list[Ignored]  # of each shard: files that belong to no sample, by reason
    start_checksums: NDArray[np.int64] | None  # None in version 1
    verified: NDArray[np.bool_]  # whether the starts of each shard are known to be what was written

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    @property
    def hash(self) -> str:
        """Of what the order depends on: the same for the same shards under another path or URL."""
        return blake2b(self.counts.tobytes() + self.fingerprints.tobytes(), digest_size=8).hexdigest()

    def find(self, shards: Sequence[str]) -> list[int | None]:
        """The number of each shard in this index: by its whole path or URL, or else by its file name."""
        numbers = {_whole(shard): number for number, shard in enumerate(self.shards)}
        found = [numbers.get(_whole(shard)) for shard in shards]
        if None in found:
            names = Counter(_file_name(shard) for shard in self.shards)
            unique = {_file_name(s): n for n, s in enumerate(self.shards) if names[_file_name(s)] == 1}
            for wanted, shard in enumerate(shards):
                number = unique.get(_file_name(shard))
                if found[wanted] is None and number is not None and self._has_size_of(number, shard):
                    found[wanted] = number
        return found

    def _has_size_of(self, number: int, shard: str) -> bool:
        """Whether a file of the same name elsewhere can be the same shard."""
        return not is_local(shard) or (os.path.isfile(shard) and os.path.getsize(shard) == self.sizes[number])

    def select(self, shards: Sequence[str]) -> "Index":
        """The index of these shards alone, read from the given paths or URLs. Raises UserError if one is not in it."""
        numbers = self.find(shards)
        if None in numbers:
            raise UserError(
                f"shard {shards[numbers.index(None)]} is not in the index {self.where}, or has another size there: add "
                f"it with `{self.command()}`, where SHARDS names all shards"
            )
        chosen = np.asarray(numbers, dtype=np.int64)
        names = ("sizes", "counts", "ends", "stamps", "fingerprints", "unlabelled", "first", "label_ranges", "verified")
        columns = {name: getattr(self, name)[chosen] for name in names}
        if self.start_checksums is not None:
            columns["start_checksums"] = self.start_checksums[chosen]
        ignored = [self.ignored[number] for number in chosen]
        return replace(self, shards=list(shards), ignored=ignored, **columns)

    def extents(self, shards: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
        """(first byte, number of bytes) of the samples `rows` of `shards`, each [n].

        Raises UserError if the index is damaged there.
        """
        if not self.verified[shards].all():
            self.verify(np.unique(shards))
        at = self.first[shards] + rows
        last = rows + 1 == self.counts[shards]
        begin = self.starts[at].astype(np.int64)
        end = np.where(last, self.ends[shards], self.starts[np.where(last, at, at + 1)])
        return begin * BLOCK, (end - begin) * BLOCK

    def verify(self, shards: Iterable[int]) -> None:
        """Raises UserError if the starts of these shards are not what was written."""
        for number in shards:
            if self.verified[number]:
                continue
            first, count = self.first[number], self.counts[number]
            starts = self.starts[first : first + count]
            if self.start_checksums is not None:
                whole = zlib.crc32(starts.data) == self.start_checksums[number]
            else:
                whole = bool((starts[1:] > starts[:-1]).all() and (starts[-1:] < self.ends[number]).all())
            if not whole:
                raise UserError(
                    f"index {self.where} is damaged (where the samples of {self.shards[number]} begin is not what was "
                    f"written): make it again with `{self.command()}`"
                )
            self.verified[number] = True

    def command(self) -> str:
        """The command that makes this index again, with its own source of labels."""
        return index_command(self.where, self.label_key)

    def class_counts(self) -> dict[int, int]:
        """Samples of each label in ascending order of labels; a sample with several labels counts for each."""
        ranges = [np.arange(begin, end) for begin, end in self.label_ranges]
        chosen = np.concatenate(ranges) if ranges else np.empty(0, np.int64)
        labels, inverse = np.unique(self.labels[chosen], return_inverse=True)
        counts = np.bincount(inverse, weights=self.label_counts[chosen], minlength=len(labels))
        return {int(label): int(count) for label, count in zip(labels, counts, strict=True)}

    def shards_with_labels_outside(self, num_classes: int) -> list[int]:
        """Numbers of the shards that hold a label outside 0 .. num_classes - 1."""
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= num_classes))
        begin, end = self.label_ranges.T
        return [int(n) for n in np.flatnonzero(np.searchsorted(wrong, begin) < np.searchsorted(wrong, end))]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "starts": None}  # not a copy of the file

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, starts=_map_starts(state["path"]))


def index_command(out: str, label_key: str) -> str:
    """The command that makes the index `out`, for sentences that advise it."""
    chosen = "" if label_key == LABEL_KEY else f" --label-key {shlex.quote(label_key)}"
    return f"fastvit data index SHARDS --out {shlex.quote(out)}{chosen}"


def is_index(content: bytes) -> bool:
    """Whether a file begins as an index does; `open_index` says whether it is a whole one."""
    return content.startswith(_MAGIC)


def open_index(path: AnyPath, copies: Path | None = None, *, label_key: str = LABEL_KEY) -> Index:
    """Maps an index into memory. Raises UserError if the file is missing, damaged or of another version.

    A remote one is copied into the folder `copies`, where it must stay if the index is to be pickled; or else into a
    temporary one. `label_key`: what errors advise to read labels from if they advise to make the index again.
    """
    shown = public_url(str(path))
    again = index_command(shown, label_key)
    try:
        if isinstance(path, Path):
            index = _read_index(path, path)
        elif copies is not None:
            index = _read_index(_copy(path, copies), path)
        else:
            with tempfile.TemporaryDirectory(prefix="fastvit-index-") as folder:
                index = _read_index(_copy(path, Path(folder)), path)  # which stays mapped
    except FileNotFoundError:
        raise UserError(f"there is no index {shown}: make it with `{again}`, or correct its name") from None
    except OSError as error:
        raise UserError(f"index {shown} cannot be read ({error.strerror or error}): make it readable") from error
    except _OtherVersion as error:
        raise UserError(f"index {shown} {error}: make it again with `{again}`") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        raise UserError(f"{shown} is not a whole index: make it again with `{again}`") from None
    if index.starts.nbytes <= _VERIFIED_AT_ONCE:
        index.verify(range(len(index.shards)))
    return index


class _OtherVersion(Exception):
    """What the version of an index is, and should be."""


def _copy(path: RemotePath, folder: Path) -> Path:
    """A remote file in a local folder, under a name that tells its content."""
    content = path.read_bytes()
    copy = folder / f"remote-{blake2b(content, digest_size=8).hexdigest()}{INDEX_SUFFIX}"
    if not copy.exists():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(copy, content)
    return copy


def _read_index(path: Path, where: AnyPath) -> Index:
    """The index in the file `path`, which was made as `where`: names of shards are relative to that folder.

    Raises OSError, _OtherVersion, or ValueError and the like if the file is damaged.
    """
    shown = public_url(str(where))
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
        magic, version, _, samples, names_at, names_size, checksum = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise ValueError("another kind of file")
        if not _FIRST_VERSION <= version <= _VERSION:
            raise _OtherVersion(f"has version {version} and this engine reads version {_VERSION}")
        if os.fstat(file.fileno()).st_size != _HEADER.size + 4 * samples + names_at + names_size:
            raise ValueError("too short or too long")
        file.seek(_HEADER.size + 4 * samples)
        body = file.read()
    covered = body if version == _FIRST_VERSION else header[: -len(checksum)] + body
    if blake2b(covered, digest_size=16).digest() != checksum:
        raise ValueError("other bytes than were written")
    names = json.loads(body[names_at:])
    columns: dict[str, Any] = {"start_checksums": None}
    at = 0
    for name, count in names["columns"].items():
        column = np.frombuffer(body, _COLUMNS[name], count, at)
        columns[name] = column if name in ("stamps", "fingerprints") else column.astype(np.int64)
        at += column.nbytes
    for shard in names["shards"]:
        if shard.startswith("pipe:"):
            raise UserError(
                f"index {shown} names the command {shard!r}, which runs only if it is given on the command line or "
                f"in a recipe: make the index again with `{index_command(shown, names['label_key'])}`"
            )
    label_ends = columns.pop("label_ends")
    folder = os.path.join(str(where.parent), "")
    counts = columns["counts"]
    if counts.sum() != samples or len(counts) != len(names["shards"]):
        raise ValueError("other samples than the shards have")
    return Index(
        path=path,
        where=shown,
        label_key=names["label_key"],
        shards=[shard if shard.startswith("/") or not is_local(shard) else folder + shard for shard in names["shards"]],
        first=np.cumsum(counts) - counts,
        starts=_map_starts(path),
        label_ranges=np.stack([np.concatenate([[0], label_ends[:-1]]), label_ends], axis=1),
        ignored=[Ignored(counts) for counts in names.get("ignored", [{}] * len(names["shards"]))],
        verified=np.zeros(len(counts), np.bool_),
        **columns,
    )


def write_index(
    shards: Sequence[str],
    path: AnyPath,
    *,
    label_key: str = LABEL_KEY,
    processes: int | None = None,
    records: Mapping[str, ShardRecord] | None = None,
    run: Callable[..., Iterable[Any]] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Index:
    """Makes the index of `shards` (paths or URLs of plain tar archives) in their order, and returns it.

    Shards that `records` or an index at `path` already describes, by size and time of change or by a remote file's tag,
    are not read again. `run`: an ordered map, run(function, tasks), that reads the shards in place of `processes` here.
    Raises UserError before anything is written, naming every bad shard with the byte, up to ten.
    """
    _check_different(shards)
    if not isinstance(path, Path):
        check_writable(path.url)  # before much is read
    known = _known_records(path, label_key) | {_whole(shard): record for shard, record in (records or {}).items()}
    scanned = _scan_all(shards, known, label_key, processes, run, progress)
    try:
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_writer(path) as file:
                _write(file, shards, scanned, label_key, path.parent)
            return open_index(path)
        with tempfile.TemporaryDirectory(prefix="fastvit-index-") as folder:
            copy = Path(folder) / INDEX_NAME
            with atomic_writer(copy) as file:
                _write(file, shards, scanned, label_key, path.parent)
            write_file(path, copy.read_bytes())
            return _read_index(copy, path)  # which stays mapped
    except OSError as error:
        advice = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another path for it"
        shown, reason = public_url(str(path)), error.strerror or error
        raise UserError(f"index {shown} cannot be written ({reason}): {advice}") from error


def _check_different(shards: Sequence[str]) -> None:
    """Raises UserError for shards that an index could not tell from each other."""
    first: dict[str, str] = {}
    for shard in shards:
        if first.setdefault(_whole(shard), shard) != shard and not is_local(shard):
            raise UserError(
                f"two shards are {public_url(shard)} without what follows '?' in their URLs, which an index does not "
                "record: give them different paths, or copy them to a disk"
            )


# ---- many shards at once


def _scan(task: tuple[str, str, tuple[int, int] | None]) -> ShardRecord | TarError | None:
    """The record of a shard, what is wrong with it, or None if it still has its known stamp."""
    shard, label_key, known = task
    if shard.startswith("pipe:"):
        return NotSeekable("is a pipe")
    try:
        if known is not None and stamp_of(shard) == known:
            return None
        with open_archive(shard) as archive:
            return scan_shard(archive.read, archive.size, archive.stamp, label_key)
    except TarError as error:
        return error
    except OSError as error:
        return TarError(f"cannot be read ({error.strerror or error})")


def _scan_all(
    shards: Sequence[str],
    known: dict[str, ShardRecord],
    label_key: str,
    processes: int | None,
    run: Callable[..., Iterable[Any]] | None,
    progress: Callable[[str], None],
) -> Iterator[ShardRecord]:
    """The records of the shards, in order. Raises UserError once all have been seen, or ten of them are bad."""
    tasks = [
        (s, label_key, (known[_whole(s)].size, known[_whole(s)].stamp) if _whole(s) in known else None) for s in shards
    ]
    problems: list[tuple[str, TarError]] = []
    started = reported = time.monotonic()
    samples = 0
    with _pool(shards, processes, run) as results_of:
        for done, (shard, result) in enumerate(zip(shards, results_of(_scan, tasks), strict=True), start=1):
            if isinstance(result, TarError):
                problems.append((shard, result))
                if len(problems) == _MOST_PROBLEMS:
                    break
                continue
            record = known[_whole(shard)] if result is None else result
            samples += len(record.starts)
            if not problems:
                yield record
            now = time.monotonic()
            if now - reported >= _REPORT_EVERY:
                rate = done / (now - started)
                left = (len(shards) - done) / rate / 60
                progress(f"{done:,} of {len(shards):,} shards, {samples:,} samples, {left:.1f} minutes left")
                reported = now
    if problems:
        raise UserError(_explain(problems))


def _explain(problems: list[tuple[str, TarError]]) -> str:
    they = "it" if len(problems) == 1 else "them"
    if all(isinstance(problem, NotSeekable) for _, problem in problems):
        remedy = f"make plain tar files of {they} (gunzip), or train with data.order=stream, since nothing in {they} "
        remedy += "can be found without reading from the beginning"
    elif all(isinstance(problem, WrongLabel) for _, problem in problems):
        remedy = "name the member or JSON field that holds the class index with data.label_key, or make "
        remedy += f"{they} again with class indices (fastvit data make)"
    else:
        remedy = f"copy or make {they} again"
    more = "; and perhaps more" if len(problems) == _MOST_PROBLEMS else ""
    return f"{'; '.join(f'shard {shard} {problem}' for shard, problem in problems)}{more}: {remedy}"


@contextlib.contextmanager
def _pool(
    shards: Sequence[str], processes: int | None, run: Callable[..., Iterable[Any]] | None
) -> Iterator[Callable[..., Iterable[Any]]]:
    """An ordered, lazy map: `run`, or over processes for local shards, and over threads for remote ones."""
    if run is not None:
        yield run
        return
    remote = not all(is_local(shard) for shard in shards)
    if processes is None:
        processes = 32 if remote else min(32, cores_here())
        if len(shards) < _WORTH_A_POOL:
            processes = 1
    if processes == 1:
        yield map
        return
    executor = ThreadPoolExecutor(processes) if remote else ProcessPoolExecutor(processes)
    try:
        yield lambda function, tasks: executor.map(function, tasks, chunksize=4)
    finally:
        executor.shutdown(cancel_futures=True)


# ---- the file


def _write(
    file: BinaryIO, shards: Sequence[str], records: Iterable[ShardRecord], label_key: str, folder: AnyPath
) -> None:
    file.write(bytes(_HEADER.size))
    columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}
    ignored: list[Ignored] = []
    for record in records:
        starts = record.starts.astype("<u4").tobytes()
        file.write(starts)
        columns["start_checksums"].append(zlib.crc32(starts))
        columns["sizes"].append(record.size)
        columns["counts"].append(len(record.starts))
        columns["ends"].append(record.end)
        columns["stamps"].append(record.stamp)
        columns["fingerprints"].append(record.fingerprint)
        columns["unlabelled"].append(record.unlabelled)
        columns["labels"] += record.labels.keys()
        columns["label_counts"] += record.labels.values()
        columns["label_ends"].append(len(columns["labels"]))
        ignored.append(record.ignored)
    write_columns(file, columns, [_relative(shard, folder) for shard in shards], label_key, ignored)


def write_columns(
    file: BinaryIO,
    columns: Mapping[str, Sequence[int]],
    shards: Sequence[str],
    label_key: str,
    ignored: Sequence[Ignored] = (),
) -> None:
    """Writes what comes after the starts, and then the header.

    columns: as in `_COLUMNS`, with the checksums of the starts. ignored: of each shard, or none for all.
    """
    body = b"".join(np.asarray(columns[name], dtype=dtype).tobytes() for name, dtype in _COLUMNS.items())
    lengths = {name: len(columns[name]) for name in _COLUMNS}
    content: dict[str, Any] = {"label_key": label_key, "columns": lengths, "shards": list(shards)}
    if any(ignored):
        content["ignored"] = list(ignored)
    names = json.dumps(content).encode()
    file.write(body)
    file.write(names)
    file.seek(0)
    samples = int(np.sum(columns["counts"], dtype=np.int64))
    header = _HEADER.pack(_MAGIC, _VERSION, 0, samples, len(body), len(names), bytes(16))[:-16]
    file.write(header + blake2b(header + body + names, digest_size=16).digest())


def _known_records(path: AnyPath, label_key: str) -> dict[str, ShardRecord]:
    try:
        index = open_index(path)
    except UserError:
        return {}
    if index.label_key != label_key:
        return {}
    known = {}
    for number, shard in enumerate(index.shards):
        with contextlib.suppress(UserError):  # damaged: the shard is read again
            index.verify([number])
            known[_whole(shard)] = _record(index, number)
    return known


def _record(index: Index, number: int) -> ShardRecord:
    first, count = index.first[number], index.counts[number]
    labels = slice(*index.label_ranges[number])
    return ShardRecord(
        int(index.sizes[number]),
        int(index.stamps[number]),
        index.starts[first : first + count],
        int(index.ends[number]),
        int(index.fingerprints[number]),
        int(index.unlabelled[number]),
        dict(zip(index.labels[labels].tolist(), index.label_counts[labels].tolist(), strict=True)),
        index.ignored[number],
    )


def _map_starts(path: Path) -> NDArray[np.uint32]:
    with open(path, "rb") as file:
        samples = _HEADER.unpack(file.read(_HEADER.size))[3]
    return np.memmap(path, dtype="<u4", mode="r", offset=_HEADER.size, shape=(samples,))


def _whole(shard: str) -> str:
    """What an index knows a shard by: its whole path, or its URL without user names, passwords and queries."""
    return os.path.abspath(shard) if is_local(shard) else public_url(shard)


def _relative(shard: str, folder: AnyPath) -> str:
    """Relative to the index's folder for shards inside it, so that the folder can be moved or copied."""
    if not is_local(shard):
        whole = _whole(shard)
        above, _, name = whole.rpartition("/")
        # Deeper in the folder, names of files would not tell the shards of a copy from each other.
        return name if above == public_url(str(folder)) else whole
    path = Path(_whole(shard))
    inside = path.is_relative_to(_whole(str(folder)))
    return str(path.relative_to(_whole(str(folder)))) if inside else str(path)


def _file_name(shard: str) -> str:
    return _whole(shard).rpartition("/")[2]
