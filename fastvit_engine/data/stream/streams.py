"""Training data from parallel streams of shards that cannot be indexed, such as gzipped ones and pipes.

A run has S parallel streams of samples and takes B / S samples (a chunk) from each in every step, so that the samples
of a step depend only on the seed, the shards, B and S. Rank r of R takes the streams s with s % R == r, and its worker
w of W those with s % (R * W) == w * R + r; workers hand over whole chunks in turn. Another S is another order. If S
does not divide B, the first streams give one sample more per step than the others; or one pair, if images are mixed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from fastvit_engine.config import Config, DataConfig
from fastvit_engine.data.pixels.draws import sample_seeds
from fastvit_engine.data.pixels.views import choose_views, draw_views, eval_views, training_views
from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.data.shards.sample import Sample
from fastvit_engine.data.stream.batch import (
    Batch,
    BatchBuilder,
    Workspace,
    empty_eval_batch,
    empty_training_batch,
)
from fastvit_engine.data.stream.batch_split import BatchSplit, mixes_pairs, possible_splits
from fastvit_engine.data.stream.rebatch import micro_batches, rebatch
from fastvit_engine.data.stream.sequential import stream_samples
from fastvit_engine.data.stream.skip import Window, step_starts
from fastvit_engine.data.stream.source import EvaluationData, ImageSizeOf, TrainingData
from fastvit_engine.data.stream.worker_pool import load_stream
from fastvit_engine.errors import UserError
from fastvit_engine.observe.units import counted


class StreamPlan(NamedTuple):
    """How the steps of a run are divided among its streams."""

    streams: int  # S, of the whole run
    chunks: tuple[int, ...]  # samples that each stream gives to a step
    streams_per_worker: int
    num_workers: int  # decoding processes of each rank; 0: the rank decodes itself

    @property
    def equal(self) -> bool:
        """Whether all streams give equally many samples to a step."""
        return min(self.chunks) == max(self.chunks)


@dataclass(frozen=True)
class StreamedShards(EvaluationData):
    """Shards that are read from beginning to end."""

    shards: tuple[str, ...]  # paths, URLs and pipes
    named: str = "data.eval"  # what names them, for errors

    def eval_batches(
        self, config: Config, *, rank: int, world_size: int, batch_size: int, pin_memory: bool
    ) -> Iterator[Batch]:
        num_workers = config.data.workers
        chunk = -(-batch_size // max(num_workers, 1))
        chunks = _EvalChunks(config, list(self.shards), self.named, chunk, rank, world_size)
        return rebatch(load_stream(chunks, num_workers=num_workers, prefetch=2), batch_size, pin_memory)


@dataclass(frozen=True)
class StreamData(TrainingData):
    """data.order: stream."""

    plan: StreamPlan
    train: tuple[str, ...]  # paths, URLs and pipes
    eval: StreamedShards | None
    samples_per_epoch: int | None
    class_names: list[str] | None = None
    notes: tuple[str, ...] = ()  # which shards were chosen by their names

    def fingerprint(self, data: DataConfig) -> dict[str, Any]:
        return {"order": "stream", "streams": self.plan.streams, "shuffle_buffer": data.shuffle_buffer}

    def describe(self) -> str:
        return (
            f"reading {counted(self.plan.streams, 'data stream')} with "
            f"{counted(max(self.plan.num_workers, 1), 'process', 'processes')} per rank, in an order that holds for "
            "this number of streams only (data.order: stream)" + "".join(f"; {note}" for note in self.notes)
        )

    def check_batch_change(self, config: Config, before: int) -> None:
        """See TrainingData. Streams that always give equally much have given the same part of any number of samples."""
        train = config.train.model_copy(update={"global_batch_size": before})
        chunks = _chunks(config.model_copy(update={"train": train}), self.plan.streams)
        if not self.plan.equal or min(chunks) < max(chunks):
            raise UserError(
                f"train.global_batch_size was {before} and is {config.train.global_batch_size} now, which "
                f"{self.plan.streams} data streams can change only between multiples of "
                f"{self.plan.streams * (2 if mixes_pairs(config) else 1)}: choose one, or set it back"
            )

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
        """See TrainingData. Starting later costs up to two passes over the shards, whose samples are thrown away."""
        sizes = next(possible_splits(config, world_size, micro_batch_size)).micro_batches(rank)
        chunks = _TrainChunks(config, list(self.train), self.plan, rank, world_size, consumed, skipped, image_size_of)
        # Each worker keeps its share of two steps ready: a step never waits for decoding that could have been done.
        prefetch = 2 * self.plan.streams_per_worker
        loaded = load_stream(chunks, num_workers=self.plan.num_workers, prefetch=prefetch)
        return micro_batches(rebatch(loaded, sizes, pin_memory), sizes, config, pin_memory)

    def eval_batches(
        self, config: Config, *, rank: int, world_size: int, batch_size: int, pin_memory: bool
    ) -> Iterator[Batch]:
        assert self.eval is not None  # data.eval is set
        return self.eval.eval_batches(
            config, rank=rank, world_size=world_size, batch_size=batch_size, pin_memory=pin_memory
        )


def plan_streams(config: Config, *, world_size: int, shards: int) -> StreamPlan:
    """Fits streams, decoding processes, shards and global batch together; raises UserError if that cannot be.

    Without data.streams every decoding process has one stream, and each rank as many processes, up to data.num_workers,
    as there are shards for and divide the global batch; if the ranks do not divide it, as there are samples for.
    """
    batch = config.train.global_batch_size
    num_workers = config.data.workers
    if config.data.streams is None:
        uneven = batch % world_size != 0
        possible = (n for n in range(num_workers, 1, -1) if world_size * n <= shards)
        fitting = (n for n in possible if batch % (world_size * n) == 0 or (uneven and _chunks(config, world_size * n)))
        num_workers = next(fitting, min(num_workers, 1))
    processes = world_size * max(num_workers, 1)
    streams = config.data.streams or processes
    if streams % processes:
        raise UserError(
            f"data.streams is {streams}, which {world_size} ranks x {processes // world_size} data workers do not "
            "divide: change data.num_workers, or data.streams to a multiple of their product"
        )
    if streams > shards:
        raise UserError(
            f"data.train has {counted(shards, 'shard')} for {streams} parallel streams: make more shards with fewer "
            "samples each, lower data.streams, or train with fewer processes"
        )
    chunks = _chunks(config, streams)
    if not chunks:
        what = "pairs of images to mix" if mixes_pairs(config) else "images"
        raise UserError(
            f"train.global_batch_size is {batch}, fewer {what} than the {streams} parallel streams: raise it, or lower "
            "data.streams or data.num_workers"
        )
    return StreamPlan(streams, chunks, streams // processes, num_workers)


def _chunks(config: Config, streams: int) -> tuple[int, ...]:
    """The samples that each stream gives to a step, divided as a batch is over ranks; none if a stream got none."""
    split = BatchSplit(config.train.global_batch_size, streams, 1, mixes_pairs(config))
    return () if split.idle_ranks else tuple(split.micro_batches(stream)[0] for stream in range(streams))


class _TrainChunks(IterableDataset):
    """This process's streams in turn, a chunk each, endlessly; a UserError is handed over as the last item."""

    def __init__(
        self,
        config: Config,
        shards: list[str],
        plan: StreamPlan,
        rank: int,
        world_size: int,
        consumed: int,
        skipped: Sequence[Window],
        image_size_of: ImageSizeOf | None,
    ) -> None:
        self.config, self.shards, self.plan = config, shards, plan
        self.rank, self.world_size, self.consumed, self.skipped = rank, world_size, consumed, skipped
        self.image_size_of, self.workspace = image_size_of, Workspace()

    def __iter__(self) -> Iterator[Batch | UserError]:
        index, processes = _process_of(self.rank, self.world_size)
        streams = {s: self._open_stream(s) for s in range(index, self.plan.streams, processes)}
        batch, next_step = self.config.train.global_batch_size, self.consumed
        try:
            for step, start in enumerate(step_starts(self.consumed, batch, self.skipped)):
                image_size = self.image_size_of and self.image_size_of(step)
                for number, samples in streams.items():
                    for _ in range((start - next_step) // batch * self.plan.chunks[number]):
                        next(samples)
                    yield self._chunk(number, samples, image_size)
                next_step = start + batch
        except UserError as error:
            yield error

    def _open_stream(self, stream: int) -> Iterator[tuple[int, Sample]]:
        return stream_samples(
            self.shards[stream :: self.plan.streams],
            seed=self.config.seed,
            stream=stream,
            shuffle_buffer=self.config.data.shuffle_buffer,
            first=self._first(stream),
        )

    def _first(self, stream: int) -> int:
        """The samples that a stream has given to the steps before. Equal chunks need not have had the same size."""
        if self.plan.equal:
            return self.consumed // self.plan.streams
        return self.consumed // self.config.train.global_batch_size * self.plan.chunks[stream]

    def _chunk(self, stream: int, samples: Iterator[tuple[int, Sample]], image_size: int | None) -> Batch:
        views = training_views(self.config, image_size)
        batch = empty_training_batch(self.plan.chunks[stream], self.config, image_size)
        builder = BatchBuilder(batch, self.config, self.workspace, [view.size for view in views])
        for row in range(self.plan.chunks[stream]):
            index, sample = next(samples)
            seeds = sample_seeds(self.config.seed, stream, index)
            batch.seeds[row : row + 1] = seeds
            draws = draw_views(seeds, views)[0]
            builder.add(row, sample, partial(choose_views, views=views, draws=draws))
        return builder.build()


class _EvalChunks(IterableDataset):
    """This process's share of the evaluation samples in chunks, padded to the same number of chunks everywhere."""

    def __init__(self, config: Config, shards: list[str], named: str, chunk: int, rank: int, world_size: int) -> None:
        self.config, self.shards, self.named, self.chunk = config, shards, named, chunk
        self.rank, self.world_size = rank, world_size
        self.workspace = Workspace()

    def __iter__(self) -> Iterator[Batch | UserError]:
        try:
            yield from self._chunks()
        except UserError as error:
            yield error

    def _chunks(self) -> Iterator[Batch]:
        index, processes = _process_of(self.rank, self.world_size)
        choose = eval_views(self.config)
        total, filled, given = 0, 0, 0
        builder = self._builder()
        for total, sample in enumerate((s for shard in self.shards for s in read_shard(shard)), start=1):
            if (total - 1) % processes != index:
                continue
            builder.add(filled, sample, choose)
            builder.seeds[filled] = total - 1
            filled += 1
            if filled == self.chunk:
                yield builder.build()
                builder, filled, given = self._builder(), 0, given + 1
        if total == 0:
            raise UserError(f"the shards of {self.named}, the first {self.shards[0]}, hold no samples: name others")
        # The whole is known to every process only now: the largest share decides the number of chunks.
        largest_share = -(-total // processes)
        while given * self.chunk < largest_share:
            yield builder.build()
            builder, given = self._builder(), given + 1

    def _builder(self) -> BatchBuilder:
        return BatchBuilder(empty_eval_batch(self.chunk, self.config), self.config, self.workspace)


def _process_of(rank: int, world_size: int) -> tuple[int, int]:
    """Index of this decoding process among those of all ranks, and their number; rank first, then worker."""
    worker = get_worker_info()
    number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
    return number * world_size + rank, workers * world_size
