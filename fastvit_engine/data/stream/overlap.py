"""Refuses a run that would evaluate on shards that it trains on, whatever they are called."""

import filecmp
import os
import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from urllib.parse import unquote, urlsplit

import numpy as np

from fastvit_engine.config import DataConfig
from fastvit_engine.data.shards.index import Index
from fastvit_engine.data.shards.names import SHARD_SUFFIXES, is_local
from fastvit_engine.data.stream.indexed import open_storage
from fastvit_engine.errors import UserError
from fastvit_engine.shown import public_url
from fastvit_engine.storage import ShardStorage

_SCHEMES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "http": "https"}  # other names of the same store
_COMPARED = 8  # samples of two shards that seem to be the same


def check_streams_apart(train: Sequence[str], held_out: Sequence[str], data: DataConfig) -> None:
    """Raises UserError if a shard, or a copy of it on a local disk, is in both, unless data.allow_overlap is set."""
    if data.allow_overlap or not held_out:
        return
    _check_identities(train, held_out)
    by_size: dict[int, list[str]] = defaultdict(list)
    for shard in filter(is_local, train):
        by_size[_size(shard)].append(shard)
    by_size.pop(0, None)
    for shard in filter(is_local, held_out):
        for candidate in by_size.get(_size(shard), []):
            if filecmp.cmp(candidate, shard, shallow=False):
                raise _overlap(candidate, shard)


def check_indexes_apart(train: Iterable[Index], held_out: Index | None, data: DataConfig) -> None:
    """Raises UserError if a shard, or a copy of it anywhere, is in both, unless data.allow_overlap is set.

    Copies are found by what the indexes say of names, positions and labels of the samples, and then by their bytes.
    """
    if data.allow_overlap or held_out is None:
        return
    evaluation = held_out
    same: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, kind in enumerate(zip(evaluation.sizes.tolist(), evaluation.fingerprints.tolist(), strict=True)):
        if evaluation.counts[number]:
            same[kind].append(number)
    for index in train:
        _check_identities(index.shards, evaluation.shards)
        storages: tuple[ShardStorage, ShardStorage] | None = None
        for number, kind in enumerate(zip(index.sizes.tolist(), index.fingerprints.tolist(), strict=True)):
            for other in same.get(kind, []):
                storages = storages or (open_storage([index], data), open_storage([evaluation], data))
                if _some_samples(index, number, storages[0]) == _some_samples(evaluation, other, storages[1]):
                    raise _overlap(index.shards[number], evaluation.shards[other])


def _some_samples(index: Index, shard: int, storage: ShardStorage) -> list[bytes]:
    """Evenly spaced samples of a shard, as they are in it."""
    rows = np.unique(np.linspace(0, index.counts[shard] - 1, _COMPARED).astype(np.int64))
    offsets, lengths = index.extents(np.full(len(rows), shard), rows)
    extents = zip(offsets.tolist(), lengths.tolist(), strict=True)
    return list(storage.read_many([(shard, *extent) for extent in extents]))


def _check_identities(train: Iterable[str], held_out: Iterable[str]) -> None:
    real_folder = cache(os.path.realpath)  # many shards are in few folders
    known = {identity: shard for shard in train for identity in _identities(shard, real_folder)}
    for shard in held_out:
        for identity in _identities(shard, real_folder):
            if identity in known:
                raise _overlap(known[identity], shard)


def _identities(shard: str, real_folder: Callable[[str], str]) -> list[object]:
    """What is equal if two paths or URLs lead to the same shard."""
    if shard.startswith("pipe:"):
        return [" ".join(shard.split())]
    if not is_local(shard):
        return [_normal_url(shard)]
    folder, name = os.path.split(shard)
    identities: list[object] = [os.path.join(real_folder(folder), name)]
    try:
        status = os.stat(shard)
    except OSError:  # reported when it is read
        return identities
    return [*identities, (status.st_dev, status.st_ino)]


def _normal_url(url: str) -> str:
    """A URL without what does not change the file that it names: case of the host, default port, signature, ..."""
    parts = urlsplit(url)
    path = posixpath.normpath(unquote(parts.path)).lstrip("/")
    host = parts.netloc.rpartition("@")[2]
    scheme = parts.scheme.lower()
    if scheme in ("http", "https"):
        host = host.lower().removesuffix(":80" if scheme == "http" else ":443")
    query = "" if path.endswith(SHARD_SUFFIXES) else f"?{parts.query}"
    return f"{_SCHEMES.get(scheme, scheme)}://{host}/{path}{query}"


def _size(shard: str) -> int:
    try:
        return os.stat(shard).st_size
    except OSError:  # reported when it is read
        return 0


def _overlap(train: str, held_out: str) -> UserError:
    train, held_out = public_url(train), public_url(held_out)
    named = f"the shard {train}" if train == held_out else f"the same shard as {train} and as {held_out}"
    return UserError(
        f"data.train and data.eval both hold {named}: set them to different shards, or set data.allow_overlap to true "
        "if you mean to evaluate on training images"
    )
