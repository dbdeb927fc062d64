"""What the index keeps of a shard, from one walk over its headers, which is also the check of the archive."""

from collections import Counter
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastvit_engine.data.shards.archive import compression_of
from fastvit_engine.data.shards.labels import MAX_LABEL_BYTES, label_member, parse_labels
from fastvit_engine.data.shards.sample import Ignored, SampleFile, iterate_files
from fastvit_engine.data.shards.tar import BLOCK, ReadAt, TarError


class WrongLabel(TarError):
    """A label that is not a class index."""


class NotSeekable(TarError):
    """A shard in which nothing can be found without reading from the beginning."""


class ShardRecord(NamedTuple):
    """What the index keeps of one shard."""

    size: int  # bytes
    stamp: int  # of the file's version
    starts: NDArray[np.uint32]  # block in which each sample's first header begins
    end: int  # block at which the last sample ends
    fingerprint: int  # of names, positions and labels
    unlabelled: int  # samples without a label
    labels: dict[int, int]  # label -> number of samples
    ignored: Ignored  # files that belong to no sample


def scan_shard(read: ReadAt, size: int, stamp: int, label_key: str) -> ShardRecord:
    """Walks over the headers of one archive. Raises TarError, with the byte, unless it consists of whole samples."""
    if compression := compression_of(read(0, 8)):
        raise NotSeekable(f"is {compression}")
    label_name, label_path = label_member(label_key)
    starts: list[int] = []
    unlabelled, labels, ignored = 0, Counter[int](), Ignored()
    digest = blake2b(digest_size=8)
    labelled = True  # whether the current sample is; there is none yet
    end = 0  # of the last member
    for file in iterate_files(read, size, ignored):
        member, end = file.member, file.member.end
        if file.first:
            unlabelled += not labelled
            labelled = False
            starts.append(member.start // BLOCK)
        digest.update(f"{member.name}\n{member.start} {member.size}\n".encode("utf-8", "surrogateescape"))
        if file.extension == label_name:
            found = _labels_of(read, file, label_key, label_path)
            labelled = bool(found)
            labels.update(found)
            digest.update(f"{found}".encode())
    unlabelled += not labelled
    if not starts:
        raise TarError("holds no samples")
    if end // BLOCK >= 2**32:
        raise TarError("is larger than 2 TiB", end)
    return ShardRecord(
        size,
        stamp,
        np.asarray(starts, dtype=np.uint32),
        end // BLOCK,
        int.from_bytes(digest.digest(), "little"),
        unlabelled,
        dict(sorted(labels.items())),
        ignored,
    )


def _labels_of(read: ReadAt, file: SampleFile, label_key: str, path: list[str]) -> list[int]:
    size = file.member.size
    if size > MAX_LABEL_BYTES:
        raise WrongLabel(f"has, in sample {file.key!r}, a label {label_key!r} of {size:,} bytes", file.member.data)
    content = read(file.member.data, size)
    try:
        return parse_labels(content, path)
    except ValueError:
        raise WrongLabel(
            f"has, in sample {file.key!r}, the label {content[:100]!r} in {label_key!r}, which is not a class index,",
            file.member.data,
        ) from None
