"""Batches for training and evaluation from indexed shards.

Workers have no state: the main process of a rank sends them positions, and a worker finds each sample's place (see
`order`), reads it with one read, decodes it and augments it with a generator of its own. So nothing about a sample
depends on which worker or rank it falls to, and the workers may be any number.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fastvit_engine.config import Config, DataConfig
from fastvit_engine.data.pixels.crops import draw_crops, eval_view, train_view
from fastvit_engine.data.pixels.draws import sample_seeds
from fastvit_engine.data.shards.index import Index
from fastvit_engine.data.shards.names import find_shards, is_local
from fastvit_engine.data.shards.sample import Sample
from fastvit_engine.data.shards.tar import TarError, iterate_files
from fastvit_engine.data.stream.batch import BadSample, Batch, BatchBuilder, Workspace, rebatch
from fastvit_engine.data.stream.order import Integers, Order, Places, SourceOrder, share_slots
from fastvit_engine.data.stream.plan import DataPlan, TrainSource
from fastvit_engine.data.stream.sequential_loader import stream_eval_chunks, stream_train_chunks
from fastvit_engine.data.stream.skip import Window, step_starts
from fastvit_engine.data.stream.worker_pool import load
from fastvit_engine.errors import UserError
from fastvit_engine.storage import ShardStorage

_PADDING = -1  # in place of a position


def build_train_data(
    config: Config,
    plan: DataPlan,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    consumed: int,
    pin_memory: bool,
    node_ranks: Sequence[int] = (),
    skipped: Sequence[Window] = (),
) -> Iterator[Batch]:
    """Endless micro-batches of this rank, from the position `consumed` of the run on, without the windows `skipped`.

    A step has global batch / world size images on each rank. Its samples and their pixels are a function of the
    indexed shards, the seed and the step's position: not of the world size, the number of workers or where a run went
    on.
    `node_ranks`: all ranks of this node, for the one among them that tells the storage of remote shards what they will
    need.
    """
    batch = config.train.global_batch_size
    if batch // world_size % micro_batch_size:
        raise UserError(
            f"the micro-batch of {micro_batch_size} images does not divide the {batch // world_size} images that each "
            f"of {world_size} ranks takes a step: change train.micro_batch_size or train.global_batch_size"
        )
    if plan.streams:
        assert isinstance(config.data.train, str)  # as it was checked before the run
        shards = find_shards(config.data.train, "train")
        chunks = stream_train_chunks(
            config, plan.streams, shards, rank=rank, world_size=world_size, consumed=consumed, skipped=skipped
        )
        return rebatch(chunks, micro_batch_size, pin_memory)

    samples = open_train_samples(config, plan)
    indexes = samples.indexes
    own = rank_places(batch, rank, world_size)
    remote = any(not is_local(shard) for index in indexes for shard in index.shards)
    read_ahead = None
    if node_ranks and remote:
        places = np.concatenate([rank_places(batch, other, world_size) for other in node_ranks])
        read_ahead = ReadAhead(build_order(config, plan.train, indexes), indexes, samples.storage, places, batch)

    def requests() -> Iterator[Integers]:
        for start in step_starts(consumed, batch, skipped):
            if read_ahead:
                read_ahead.at(start)
            for micro in (start + own).reshape(-1, micro_batch_size):
                yield from _pieces(micro, config)

    return rebatch(_load(samples, requests(), micro_batch_size, config), micro_batch_size, pin_memory)


def rank_places(batch: int, rank: int, world_size: int) -> Integers:
    """The places of a global batch that are a rank's: every world_size-th pair of neighbours, from the rank-th pair on.

    In pairs, because images are mixed in pairs: so the world size does not change who is mixed with whom. Single places
    where a rank has an odd number of them.
    """
    size = 2 if batch // world_size % 2 == 0 else 1
    return np.arange(batch).reshape(-1, size)[rank::world_size].ravel()


def build_eval_data(
    config: Config, plan: DataPlan, *, rank: int, world_size: int, batch_size: int, pin_memory: bool
) -> Iterator[Batch]:
    """One pass over the evaluation shards: every sample once over all ranks, in equally many equal batches a rank.

    Batches are padded with weight 0. Each rank reads one contiguous part of the samples.
    """
    if plan.eval is None:
        shards = find_shards(config.data.eval, "eval")
        chunks = stream_eval_chunks(config, shards, rank=rank, world_size=world_size, batch_size=batch_size)
        return rebatch(chunks, batch_size, pin_memory)

    index = plan.eval.open()
    share = -(-index.samples // world_size)
    positions = np.arange(rank * share, -(-share // batch_size) * batch_size + rank * share)
    positions[(positions >= (rank + 1) * share) | (positions >= index.samples)] = _PADDING
    requests = (
        piece
        for start in range(0, len(positions), batch_size)
        for piece in _pieces(positions[start : start + batch_size], config)
    )
    samples = _EvalSamples(config, index, open_storage([index], config.data))
    return rebatch(_load(samples, requests, batch_size, config), batch_size, pin_memory)


def open_train_samples(config: Config, plan: DataPlan) -> "TrainSamples":
    """The samples of indexed shards, by their position in the run."""
    indexes = [source.data.open() for source in plan.train]
    return TrainSamples(config, plan.train, indexes, open_storage(indexes, config.data))


def open_storage(indexes: list[Index], data: DataConfig) -> ShardStorage:
    """The shards of all indexes, numbered through."""
    shards = [shard for index in indexes for shard in index.shards]
    sizes = [int(size) for index in indexes for size in index.sizes]
    cache_bytes = None if data.cache_gb is None else int(data.cache_gb * 1e9)
    cache_dir = None if data.cache is None else Path(data.cache)
    return ShardStorage(shards, sizes, cache_dir=cache_dir, cache_bytes=cache_bytes)


def build_order(config: Config, sources: tuple[TrainSource, ...], indexes: list[Index]) -> Order:
    """The order of a run over its sources."""
    orders = [
        SourceOrder(index.counts, seed=config.seed, lanes=source.lanes, window=config.data.window, source=number)
        for number, (source, index) in enumerate(zip(sources, indexes, strict=True))
    ]
    return Order(orders, share_slots([source.weight for source in sources]), config.seed)


class _Samples:
    """Batches of the samples at positions (int64 [n])."""

    def __init__(self, config: Config, indexes: list[Index], storage: ShardStorage) -> None:
        self.config, self.indexes, self.storage = config, indexes, storage
        self.first_shard = np.cumsum([0, *(len(index.shards) for index in indexes)])
        self.workspace = Workspace()

    def build(self, positions: Integers, empty: Batch) -> Batch:
        raise NotImplementedError

    def read(self, places: Places) -> Iterator[Sample | BadSample]:
        """The samples at `places`, in order, each with one read."""
        offsets, lengths = np.empty_like(places.row), np.empty_like(places.row)
        for source in np.unique(places.source):
            own = places.source == source
            offsets[own], lengths[own] = self.indexes[source].extents(places.shard[own], places.row[own])
        numbers = self.first_shard[places.source] + places.shard
        for i in range(len(offsets)):
            name = self.indexes[places.source[i]].shards[places.shard[i]]
            content = self.storage.read(int(numbers[i]), int(offsets[i]), int(lengths[i]))
            try:
                yield parse_sample(content, name)
            except TarError as error:
                # Its key is unknown; this one is the same in every run.
                key = f"{name.rpartition('/')[2]}#{places.row[i]}"
                reason = f"is damaged: what the index finds at byte {offsets[i]:,} of the shard {error} of it"
                yield BadSample(key, name, reason)


class TrainSamples(_Samples):
    def __init__(
        self, config: Config, sources: tuple[TrainSource, ...], indexes: list[Index], storage: ShardStorage
    ) -> None:
        super().__init__(config, indexes, storage)
        self.order = build_order(config, sources, indexes)

    def build(self, positions: Integers, empty: Batch) -> Batch:
        builder = BatchBuilder(empty, self.config, self.workspace)
        places = self.order.locate(positions)
        seeds = sample_seeds(self.config.seed, places.source, places.epoch, places.position)
        empty.seeds[:] = seeds
        draws = draw_crops(seeds)
        view = partial(train_view, image_size=self.config.model.image_size, augment=self.config.augment)
        for row, sample in enumerate(self.read(places)):
            if isinstance(sample, BadSample):
                builder.add_bad(row, sample)
            else:
                builder.add(row, sample, partial(view, draws=draws[row]))
        return builder.build()


class _EvalSamples(_Samples):
    def __init__(self, config: Config, index: Index, storage: ShardStorage) -> None:
        super().__init__(config, [index], storage)
        self.ends = np.cumsum(index.counts)

    def build(self, positions: Integers, empty: Batch) -> Batch:
        builder = BatchBuilder(empty, self.config, self.workspace)
        view = partial(eval_view, image_size=self.config.model.image_size, eval_crop=self.config.data.eval_crop)
        real = positions[positions != _PADDING]  # which stands at the end
        shard = np.searchsorted(self.ends, real, side="right")
        row = real - (self.ends - self.indexes[0].counts)[shard]
        zero = np.zeros_like(real)
        for place, sample in enumerate(self.read(Places(zero, shard, row, zero, real))):
            if isinstance(sample, BadSample):
                builder.add_bad(place, sample)
            else:
                builder.add(place, sample, view)
        return builder.build()


def parse_sample(content: bytes, shard: str) -> Sample:
    """The sample whose extent in `shard` has this content; TarError where it is no whole sample."""
    sample: Sample = {"__url__": shard}
    for key, extension, data in iterate_files(content):
        if sample.setdefault("__key__", key) != key:
            raise TarError("has members of another sample")
        sample[extension] = data
    if "__key__" not in sample:
        raise TarError("has no member")
    return sample


class ReadAhead:
    """Tells the storage which shards a node will read, the nearest first, for the next two windows of every lane."""

    def __init__(self, order: Order, indexes: list[Index], storage: ShardStorage, places: Integers, batch: int) -> None:
        """`order`: one of its own, since an order remembers the windows it was asked for last. `places`: of the node's
        samples within a global batch."""
        self._order, self._storage = order, storage
        self._first_shard = np.cumsum([0, *(len(index.shards) for index in indexes)])
        horizon = 2 * sum(source.lanes * source.window for source in order.sources)
        self._ahead = (np.arange(0, horizon, batch)[:, None] + places).ravel()
        self._every = max(batch, horizon // 8)
        self._next = 0

    def at(self, start: int) -> None:
        """The step whose positions begin at `start` is about to be read."""
        if start < self._next:
            return
        self._next = start + self._every
        places = self._order.locate(start + self._ahead)
        shards, first_need = np.unique(self._first_shard[places.source] + places.shard, return_index=True)
        self._storage.will_need(shards[np.argsort(first_need)].tolist())


def _pieces(positions: Integers, config: Config) -> list[Integers]:
    """A batch's positions in a part for each worker."""
    parts = np.array_split(positions, max(config.data.num_workers, 1))
    return [part for part in parts if len(part)]


def _load(samples: _Samples, requests: Iterator[Integers], batch_size: int, config: Config) -> Iterator[Batch]:
    num_workers = config.data.num_workers
    return load(
        samples.build,
        requests,
        num_workers=num_workers,
        prefetch=2,
        image_size=config.model.image_size,
        most=-(-batch_size // max(num_workers, 1)),
        max_labels=config.data.max_labels,
    )
