"""What every process has to know to read the data of a run; decided once, by the main process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastvit_engine.config import DataConfig
from fastvit_engine.data.shards.index import Index, open_index
from fastvit_engine.errors import UserError


class StreamPlan(NamedTuple):
    """How the steps of a run are laid over its streams (data.order: stream)."""

    streams: int  # S, of the whole run
    chunk: int  # samples that each stream gives to a step: global batch / S
    streams_per_worker: int
    num_workers: int  # decoding processes of each rank; 0: the rank decodes itself


@dataclass(frozen=True)
class IndexedShards:
    """Some of the shards of an index, at these paths or URLs."""

    index: Path
    shards: tuple[str, ...]
    hash: str  # of the index of these shards

    @classmethod
    def of(cls, index: Index) -> "IndexedShards":
        return cls(index.path, tuple(index.shards), index.hash)

    def open(self) -> Index:
        """The index of these shards; UserError where it is no longer the one that the run was planned with."""
        index = open_index(self.index).select(self.shards)
        if index.hash != self.hash:
            raise UserError(f"index {self.index} was written anew while the run was starting: start the run again")
        return index


@dataclass(frozen=True)
class TrainSource:
    data: IndexedShards
    weight: float
    samples: int
    lanes: int


@dataclass(frozen=True)
class DataPlan:
    train: tuple[TrainSource, ...]  # none where streams are read
    eval: IndexedShards | None
    streams: StreamPlan | None
    samples_per_epoch: int | None  # None where nobody has counted them
    class_names: list[str] | None  # from dataset.json

    def fingerprint(self, data: DataConfig) -> dict[str, Any]:
        """What the order depends on besides the seed, for the state of a run."""
        if self.streams:
            return {"order": "stream", "streams": self.streams.streams, "shuffle_buffer": data.shuffle_buffer}
        sources = [{"index": s.data.hash, "lanes": s.lanes, "weight": s.weight} for s in self.train]
        return {"order": "indexed", "window": data.window, "sources": sources}

    def describe(self) -> str:
        """What is read and how, for the first line of a run."""
        if self.streams:
            return (
                f"reading {self.streams.streams} data streams with {max(self.streams.num_workers, 1)} process(es) a "
                "rank, in an order that holds for this number of streams only (data.order: stream)"
            )
        samples = sum(source.samples for source in self.train)
        lanes = " + ".join(str(source.lanes) for source in self.train)
        return f"reading {samples:,} samples in {lanes} lane(s)"
