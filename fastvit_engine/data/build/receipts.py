"""Shards that are written one after another, whole or not at all, each with a receipt until all of them are there."""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from webdataset.writer import TarWriter

from fastvit_engine.data.build.output import Output
from fastvit_engine.data.shards.remote_path import AnyPath, is_remote
from fastvit_engine.data.shards.sample import Ignored
from fastvit_engine.data.shards.scan import ShardRecord, scan_shard
from fastvit_engine.data.shards.tar import windowed

_WINDOW = 1 << 14  # bytes that are read at once when walking over headers


class Receipt(NamedTuple):
    """The record of a complete shard, in a file of its own until all shards are complete."""

    samples: int
    bytes: int
    failed: list[list[str]]  # name and reason
    stamp: int | None = None  # of the version of the object, in a store
    record: dict[str, Any] | None = None  # what the index keeps of a shard in a store, which is not read again
    counted: dict[str, float] | None = None  # what else is known of its samples


class _NothingToWrite(Exception):
    """A shard would have no sample."""


def write_shard(output: Output, name: str, temporary: Path, samples: Iterable[Mapping[str, Any]]) -> Receipt:
    """Writes a shard of samples, members by extension and "__key__", unless there are none. Raises OSError.

    The receipt, whose failures are for the caller to add, is not stored.
    """
    written = size = 0
    record: ShardRecord | None = None
    with contextlib.suppress(_NothingToWrite), output.new_shard(name, temporary) as file:
        with TarWriter(file, user="fastvit", group="fastvit", mtime=0, encoder=False) as tar:
            for members in samples:
                tar.write(members)
                written += 1
        if not written:
            raise _NothingToWrite
        size = file.tell()
        if is_remote(str(output.path)):
            record = _scan(file, size)
    if record is None:
        return Receipt(written, size, [])
    return Receipt(written, size, [], output.stamps([name])[name][1], _to_json(record))


def store_receipt(output: Output, name: str, receipt: Receipt, temporary: Path) -> None:
    """Says that a shard is complete. Raises OSError."""
    output.write_receipt(name, json.dumps(receipt._asdict()).encode(), temporary)


def complete_shards(output: Output, names: Sequence[str]) -> dict[str, Receipt]:
    """The receipts of the shards that are complete: there, and as their receipts say. A damaged receipt is none."""
    stored, receipts = output.receipts(), dict[str, Receipt]()
    for name in names:
        with contextlib.suppress(KeyError, ValueError, TypeError):
            receipts[name] = Receipt(**json.loads(stored[name]))
    stamps = output.stamps([name for name, receipt in receipts.items() if receipt.samples])
    return {
        name: receipt
        for name, receipt in receipts.items()
        if receipt.samples == 0 or stamps.get(name) == (receipt.bytes, receipt.stamp)
    }


def records_of(out: AnyPath, receipts: Mapping[str, Receipt]) -> dict[str, ShardRecord]:
    """What the index keeps of those shards that were scanned when they were written, by their paths or URLs."""
    return {
        str(out / name): _from_json(receipt.record, receipt.stamp)
        for name, receipt in receipts.items()
        if receipt.record is not None and receipt.stamp is not None
    }


def _scan(file: BinaryIO, size: int) -> ShardRecord:
    """What the index keeps of a shard that has just been written."""
    file.flush()
    read = windowed(lambda at, length: os.pread(file.fileno(), length, at), _WINDOW)
    return scan_shard(read, size, 0, "cls")


def _to_json(record: ShardRecord) -> dict[str, Any]:
    return record._asdict() | {"starts": record.starts.tolist(), "labels": list(record.labels.items())}


def _from_json(record: dict[str, Any], stamp: int) -> ShardRecord:
    starts, labels = np.asarray(record["starts"], np.uint32), dict(record["labels"])
    return ShardRecord(**record | {"starts": starts, "labels": labels, "stamp": stamp, "ignored": Ignored()})
