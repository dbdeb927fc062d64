"""Samples of one shard, and the endless shuffled stream of samples that a group of shards gives."""

import random
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from webdataset.filters import shuffle
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys

from fastvit_engine.data.shards.names import is_local
from fastvit_engine.data.shards.sample import Sample
from fastvit_engine.errors import UserError


class StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged or missing header for the end of the archive and stops silently; this one raises."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "StrictTarInfo":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the zero block that ends a whole archive
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tarfile_.offset}") from error


def read_shard(shard: str) -> Iterator[Sample]:
    """Samples of a tar or tar.gz shard (path or URL) in stored order.

    Raises UserError naming the shard where it is truncated, damaged, unreadable or holds a member twice: also for
    damage that WebDataset's own tar reading passes over in silence.
    """
    try:
        with _open(shard) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=StrictTarInfo) as tar:
            yield from group_by_keys(_members(tar, shard))
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or next(iter(error.args), type(error).__name__)
        raise UserError(f"shard {shard} is damaged or unreadable ({reason}): copy or make it again") from error


def stream_samples(
    shards: list[str], *, seed: int, stream: int, shuffle_buffer: int, first: int = 0
) -> Iterator[tuple[int, Sample]]:
    """Endless (index in the stream, sample) pairs from index `first` on; the order depends on the arguments only.

    Each epoch permutes the stream's shards and shuffles their samples through a buffer of `shuffle_buffer` samples,
    both seeded by (seed, stream, epoch). Samples before `first` are read and dropped: at most the stream's first epoch
    (which tells its length, the same in every epoch) and the part of the epoch that `first` falls into.
    """
    epoch, start = 0, 0
    while True:
        length = 0
        for sample in _read_epoch(shards, random.Random(f"{seed}/{stream}/{epoch}"), shuffle_buffer):
            if start + length >= first:
                yield start + length, sample
            length += 1
        if length == 0:
            raise UserError(f"the shards {', '.join(shards)} hold no samples: remove them from data.train")
        epochs = max(1, (first - start) // length)  # whole epochs before `first` need not be read
        epoch += epochs
        start += epochs * length


def _read_epoch(shards: list[str], rng: random.Random, shuffle_buffer: int) -> Iterator[Sample]:
    order = rng.sample(shards, len(shards))
    samples = (sample for shard in order for sample in read_shard(shard))
    return shuffle(shuffle_buffer, initial=shuffle_buffer, rng=rng)(samples)


def _open(shard: str) -> BinaryIO:
    return open(shard, "rb") if is_local(shard) else gopen(shard)


def _members(tar: tarfile.TarFile, shard: str) -> Iterator[dict[str, Any]]:
    """The files of an archive in the form that webdataset groups into samples."""
    while (member := tar.next()) is not None:
        if member.isreg():
            content = tar.extractfile(member)
            assert content is not None  # only links and folders have no content
            yield {"fname": member.name, "data": content.read(), "__url__": shard}
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
    # A zeroed header looks like the end: nothing but padding may follow the real one.
    assert tar.fileobj is not None
    while block := tar.fileobj.read(tarfile.RECORDSIZE):
        if block.strip(b"\0"):
            raise tarfile.ReadError("data after the end of the archive")
