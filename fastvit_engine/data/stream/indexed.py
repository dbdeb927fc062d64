"""Training data from indexed shards: any sample is read by its position, so the order is exact.

Workers have no state: the main process of a rank sends them positions, and a worker locates each sample (see `order`),
reads it with one read, decodes it and augments it with a generator of its own. So nothing about a sample depends on
which worker or rank it falls to, and any number of workers will do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastvit_engine.config import Config, DataConfig
from fastvit_engine.data.pixels.compressed import image_size_of
from fastvit_engine.data.pixels.draws import sample_seeds
from fastvit_engine.data.pixels.views import (
    choose_views,
    draw_views,
    eval_shape,
    eval_views,
    images_shape,
    training_views,
)
from fastvit_engine.data.shards.index import Index, open_index
from fastvit_engine.data.shards.names import is_local
from fastvit_engine.data.shards.sample import Sample, parse_sample
from fastvit_engine.data.shards.tar import TarError
from fastvit_engine.data.stream.batch import (
    BadSample,
    Batch,
    BatchBuilder,
    LabelForm,
    Workspace,
    leaves_compressed,
)
from fastvit_engine.data.stream.batch_split import possible_splits
from fastvit_engine.data.stream.order import Integers, Locations, Order, SourceOrder, share_slots
from fastvit_engine.data.stream.read_ahead import ReadAhead
from fastvit_engine.data.stream.rebatch import micro_batches
from fastvit_engine.data.stream.skip import Window, step_starts
from fastvit_engine.data.stream.source import EvaluationData, ImageSizeOf, TrainingData
from fastvit_engine.data.stream.subset import SubsetOrder, subsets_of_sources
from fastvit_engine.data.stream.worker_pool import Request, load
from fastvit_engine.errors import UserError
from fastvit_engine.observe.units import counted
from fastvit_engine.shown import public_url
from fastvit_engine.storage import ShardStorage

_PADDING = -1  # instead of a position


@dataclass(frozen=True)
class IndexedShards(EvaluationData):
    """Some of the shards of an index, at these paths or URLs."""

    index: Path
    shards: tuple[str, ...]
    hash: str  # of the index of these shards

    @classmethod
    def of(cls, index: Index) -> "IndexedShards":
        return cls(index.path, tuple(index.shards), index.hash)

    def open(self) -> Index:
        """The index of these shards. Raises UserError if it is no longer the one that the run was planned with."""
        index = open_index(self.index).select(self.shards)
        if index.hash != self.hash:
            raise UserError(f"index {self.index} was written anew while the run was starting: start the run again")
        return index

    def eval_batches(
        self, config: Config, *, rank: int, world_size: int, batch_size: int, pin_memory: bool
    ) -> Iterator[Batch]:
        """See EvaluationData. Each rank reads one contiguous part of the samples."""
        index = self.open()
        share = -(-index.samples // world_size)
        positions = np.arange(rank * share, -(-share // batch_size) * batch_size + rank * share)
        positions[(positions >= (rank + 1) * share) | (positions >= index.samples)] = _PADDING
        shape = eval_shape(config)
        requests = (
            Request(positions[start : start + batch_size], shape) for start in range(0, len(positions), batch_size)
        )
        samples = _EvalSamples(config, index, open_storage([index], config.data))
        return _load(samples, requests, [batch_size], config, pin_memory)


@dataclass(frozen=True)
class TrainSource:
    """One of the sources that training mixes."""

    data: IndexedShards
    weight: float
    samples: int  # that training reads: those of data.subset, if it is set
    lanes: int  # parts that its epochs are cut into, see `order`


@dataclass(frozen=True)
class IndexedData(TrainingData):
    """data.order: indexed."""

    train: tuple[TrainSource, ...]
    eval: IndexedShards | None
    samples_per_epoch: int | None
    class_names: list[str] | None = None
    notes: tuple[str, ...] = ()  # which shards were chosen by their names
    subset_of: int | None = None  # samples that the shards hold, if data.subset is set

    def fingerprint(self, data: DataConfig) -> dict[str, Any]:
        sources = [{"index": s.data.hash, "lanes": s.lanes, "weight": s.weight} for s in self.train]
        subset = {} if self.subset_of is None else {"subset": sum(source.samples for source in self.train)}
        return {"order": "indexed", "window": data.window, "sources": sources, **subset}

    def describe(self) -> str:
        samples = sum(source.samples for source in self.train)
        lanes = " + ".join(str(source.lanes) for source in self.train)
        mixed = " in 1 lane" if lanes == "1" else f", mixed from {lanes} lanes"
        notes = "".join(f"; {note}" for note in self.notes)
        subset = "" if self.subset_of is None else f" of {self.subset_of:,} (data.subset)"
        epoch = self.samples_per_epoch
        counts = "" if epoch in (None, samples) else f"; an epoch counts as {epoch:,} samples (data.train_samples)"
        return f"reading {counted(samples, 'sample')}{subset}{mixed} (data.lanes){counts}{notes}"

    def train_batches(
        self,
        config: Config,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        consumed: int,
        pin_memory: bool,
        node_ranks: Sequence[int] = (),
        skipped: Sequence[Window] = (),
        image_size_of: ImageSizeOf | None = None,
    ) -> Iterator[Batch]:
        """See TrainingData.

        Samples and pixels of a step are a function of the indexed shards, the seed and the step: not of the world size,
        the number of workers or the step that a run resumed at.
        """
        split = next(possible_splits(config, world_size, micro_batch_size))
        batch = config.train.global_batch_size
        samples = open_train_samples(config, self)
        own, sizes = split.positions(rank), split.micro_batches(rank)
        ends = np.cumsum(sizes)[:-1]
        read_ahead = None
        if node_ranks and any(not is_local(shard) for index in samples.indexes for shard in index.shards):
            positions = np.concatenate([split.positions(other) for other in node_ranks])
            order = build_order(config, self.train, samples.indexes)
            read_ahead = ReadAhead(order, samples.indexes, samples.storage, positions, batch)

        def requests() -> Iterator[Request]:
            for step, start in enumerate(step_starts(consumed, batch, skipped)):
                if read_ahead:
                    read_ahead.at(start)
                shape = _train_shape(config, image_size_of and image_size_of(step))
                yield from (Request(micro, shape) for micro in np.split(start + own, ends) if len(micro))

        return micro_batches(_load(samples, requests(), sizes, config, pin_memory), sizes, config, pin_memory)

    def eval_batches(
        self, config: Config, *, rank: int, world_size: int, batch_size: int, pin_memory: bool
    ) -> Iterator[Batch]:
        assert self.eval is not None  # data.eval is set
        return self.eval.eval_batches(
            config, rank=rank, world_size=world_size, batch_size=batch_size, pin_memory=pin_memory
        )


def open_train_samples(config: Config, data: IndexedData) -> "TrainSamples":
    """The samples of indexed shards, by their position in the run."""
    indexes = [source.data.open() for source in data.train]
    return TrainSamples(config, data.train, indexes, open_storage(indexes, config.data))


def open_storage(indexes: list[Index], data: DataConfig) -> ShardStorage:
    """The shards of all indexes, numbered through."""
    shards = [shard for index in indexes for shard in index.shards]
    sizes = [int(size) for index in indexes for size in index.sizes]
    cache_bytes = None if data.cache_gb is None else int(data.cache_gb * 1e9)
    cache_dir = None if data.cache is None else Path(data.cache)
    remedies: list[str] = []
    for index in indexes:
        remedies += [f"restore the shard, or make the index again with `{index.command()}`"] * len(index.shards)
    return ShardStorage(shards, sizes, cache_dir=cache_dir, cache_bytes=cache_bytes, remedies=remedies)


def build_order(config: Config, sources: tuple[TrainSource, ...], indexes: list[Index]) -> Order:
    """The order of a run over its sources."""
    subsets = subsets_of_sources([index.samples for index in indexes], config.data, config.seed)
    orders: list[SourceOrder] = []
    for number, (source, index) in enumerate(zip(sources, indexes, strict=True)):
        how: Any = {"seed": config.seed, "lanes": source.lanes, "window": config.data.window, "source": number}
        if subsets is None:
            orders.append(SourceOrder(index.counts, **how))
        else:
            orders.append(SubsetOrder(subsets[number], index.counts, **how))
    return Order(orders, share_slots([source.weight for source in sources]), config.seed)


class _Samples:
    """Batches of the samples at positions (int64 [n])."""

    training: bool

    def __init__(self, config: Config, indexes: list[Index], storage: ShardStorage) -> None:
        self.config, self.indexes, self.storage = config, indexes, storage
        self.first_shard = np.cumsum([0, *(len(index.shards) for index in indexes)])
        self.shards = [shard for index in indexes for shard in index.shards]
        self.workspace = Workspace()

    def build(self, positions: Integers, empty: Batch) -> Batch:
        raise NotImplementedError

    def read(self, at: Locations) -> Iterator[Sample | BadSample]:
        """The samples at these locations, in order; reads of remote shards are in flight together."""
        offsets, lengths = np.empty_like(at.row), np.empty_like(at.row)
        for source in np.unique(at.source):
            own = at.source == source
            offsets[own], lengths[own] = self.indexes[source].extents(at.shard[own], at.row[own])
        numbers = self.first_shard[at.source] + at.shard
        ranges = list(zip(numbers.tolist(), offsets.tolist(), lengths.tolist(), strict=True))
        for row, (number, offset, _), content in zip(at.row, ranges, self.storage.read_many(ranges), strict=True):
            try:
                yield parse_sample(content, self.shards[number])
            except TarError as error:
                # Its key is unknown; this one is the same in every run.
                name = public_url(self.shards[number])
                key = f"{name.rpartition('/')[2]}#{row}"
                reason = f"is damaged: what the index finds at byte {offset:,} of the shard {error} of it"
                yield BadSample(key, name, reason)


class TrainSamples(_Samples):
    """Reads and augments training samples by their positions in the run."""

    training = True

    def __init__(
        self, config: Config, sources: tuple[TrainSource, ...], indexes: list[Index], storage: ShardStorage
    ) -> None:
        super().__init__(config, indexes, storage)
        self.order = build_order(config, sources, indexes)

    def build(self, positions: Integers, empty: Batch) -> Batch:
        compressed = leaves_compressed(self.config)
        views = training_views(self.config, _image_size(empty.images.shape, compressed))
        sizes = [view.size for view in views]
        builder = BatchBuilder(empty, self.config, self.workspace, sizes, compressed=compressed)
        located = self.order.locate(positions)
        seeds = sample_seeds(self.config.seed, located.source, located.epoch, located.position)
        empty.seeds[:] = seeds
        draws = draw_views(seeds, views)
        for row, sample in enumerate(self.read(located)):
            if isinstance(sample, BadSample):
                builder.add_bad(row, sample)
            else:
                builder.add(row, sample, partial(choose_views, views=views, draws=draws[row]))
        return builder.build()


class _EvalSamples(_Samples):
    training = False

    def __init__(self, config: Config, index: Index, storage: ShardStorage) -> None:
        super().__init__(config, [index], storage)
        self.ends = np.cumsum(index.counts)

    def build(self, positions: Integers, empty: Batch) -> Batch:
        builder = BatchBuilder(empty, self.config, self.workspace)
        choose = eval_views(self.config)
        real = positions[positions != _PADDING]  # which is at the end
        empty.seeds[: len(real)] = real
        shard = np.searchsorted(self.ends, real, side="right")
        row = real - (self.ends - self.indexes[0].counts)[shard]
        zero = np.zeros_like(real)
        for number, sample in enumerate(self.read(Locations(zero, shard, row, zero, real))):
            if isinstance(sample, BadSample):
                builder.add_bad(number, sample)
            else:
                builder.add(number, sample, choose)
        return builder.build()


def _train_shape(config: Config, image_size: int | None = None) -> tuple[int, ...]:
    """Of the images of a training sample in a batch."""
    return images_shape(training_views(config, image_size), compressed=leaves_compressed(config))


def _image_size(shape: Sequence[int], compressed: bool) -> int | None:
    """Of the squares in a batch whose images have this shape; None if there are none, or several of an image."""
    if compressed:
        return image_size_of(shape[1])
    return shape[1] if len(shape) == 4 else None


def _load(
    samples: _Samples, requests: Iterator[Request], sizes: Sequence[int], config: Config, pin_memory: bool
) -> Iterator[Batch]:
    return load(
        samples.build,
        requests,
        sizes=[size for size in sizes if size],
        largest=_train_shape(config) if samples.training else eval_shape(config),
        num_workers=config.data.workers,
        prefetch=2,
        pin_memory=pin_memory,
        labels=LabelForm.of(config, training=samples.training),
    )
