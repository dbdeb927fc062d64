"""Batches for training and evaluation: streams split over ranks and worker processes.

A run has S parallel streams of samples and takes B / S samples (a chunk) from each in every step, whatever the number
of ranks and workers: so the samples of a step depend on the seed, the shards, B and S only. Rank r of R takes the
streams s with s % R == r, and its worker w of W those with s % (R * W) == w * R + r. Workers hand over whole chunks
in turn, which gives the rank its chunks in ascending order of s for every W.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fastvit_engine.config import Config
from fastvit_engine.data.augment import View, draw_crops, eval_view, render, train_view
from fastvit_engine.data.batch import Batch, empty_batch, rebatch
from fastvit_engine.data.decode import PixelBuffer, decode_sample
from fastvit_engine.data.shards import find_shards
from fastvit_engine.data.stream import Sample, read_shard, stream_samples
from fastvit_engine.errors import UserError


class StreamPlan(NamedTuple):
    """How the steps of a run are laid over its streams."""

    streams: int  # S, of the whole run
    chunk: int  # samples that each stream gives to a step: global batch / S
    streams_per_worker: int
    num_workers: int  # decoding processes of each rank; 0: the rank decodes itself


def plan_streams(config: Config, *, world_size: int, shards: int) -> StreamPlan:
    """Fits streams, decoding processes, shards and global batch together; UserError where that cannot be.

    Without data.streams every decoding process has one stream, and each rank the most processes up to data.num_workers
    for which there are enough shards and the global batch divides.
    """
    batch = config.train.global_batch_size
    num_workers = config.data.num_workers
    if config.data.streams is None:
        fitting = (n for n in range(num_workers, 1, -1) if world_size * n <= shards and batch % (world_size * n) == 0)
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
            f"data.train has {shards} shards for {streams} parallel streams: make more shards with fewer samples each, "
            "lower data.streams, or train with fewer processes"
        )
    if batch % streams:
        raise UserError(
            f"train.global_batch_size is {batch}, which the {streams} parallel streams do not divide: "
            "change it, data.streams or data.num_workers"
        )
    return StreamPlan(streams, batch // streams, streams // processes, num_workers)


def build_train_data(
    config: Config, *, rank: int, world_size: int, micro_batch_size: int, first_step: int, pin_memory: bool
) -> Iterator[Batch]:
    """Endless micro-batches of this rank, from global step `first_step` on; global batch / world size images a step.

    For a given data.streams (its default follows the number of processes: set it to move a run between world sizes)
    the samples of a step and their augmented pixels are the same for every world size and number of workers that fit.
    Starting at a later step gives exactly what an uninterrupted run would have given from there on; its cost grows
    with the step to about two readings of the shards without decoding (see stream_samples), until an index of the
    shards takes its place.
    """
    shards = find_shards(config.data.train, "train")
    plan = plan_streams(config, world_size=world_size, shards=len(shards))
    local_batch_size = config.train.global_batch_size // world_size
    if local_batch_size % micro_batch_size:
        raise UserError(
            f"the micro-batch of {micro_batch_size} images does not divide the {local_batch_size} images that each of "
            f"{world_size} ranks takes a step: change train.micro_batch_size or train.global_batch_size"
        )
    chunks = _TrainChunks(config, shards, plan, rank, world_size, first_step)
    # Each worker keeps its share of two steps ready, so that a step never waits for decoding it could have done before.
    loaded = _load(chunks, plan.num_workers, prefetch_chunks=2 * plan.streams_per_worker)
    return rebatch(loaded, micro_batch_size, pin_memory)


def build_eval_data(
    config: Config, *, rank: int, world_size: int, batch_size: int, pin_memory: bool
) -> Iterator[Batch]:
    """One pass over the evaluation shards: every sample once over all ranks, in equally many equal batches a rank.

    Batches are padded with weight 0. Every process reads all shards and decodes its share of the samples.
    """
    shards = find_shards(config.data.eval, "eval")
    chunk = -(-batch_size // max(config.data.num_workers, 1))
    loaded = _load(_EvalChunks(config, shards, chunk, rank, world_size), config.data.num_workers, prefetch_chunks=2)
    return rebatch(loaded, batch_size, pin_memory)


class _TrainChunks(IterableDataset):
    """This process's streams in turn, a chunk each, for ever; a UserError is handed over as the last item."""

    def __init__(
        self, config: Config, shards: list[str], plan: StreamPlan, rank: int, world_size: int, first_step: int
    ) -> None:
        self.config, self.shards, self.plan = config, shards, plan
        self.rank, self.world_size, self.first_step = rank, world_size, first_step

    def __iter__(self) -> Iterator[Batch | UserError]:
        index, processes = _process_of(self.rank, self.world_size)
        streams = {s: self._open_stream(s) for s in range(index, self.plan.streams, processes)}
        try:
            while True:
                for number, samples in streams.items():
                    yield self._chunk(number, samples)
        except UserError as error:
            yield error

    def _open_stream(self, stream: int) -> Iterator[tuple[int, Sample]]:
        return stream_samples(
            self.shards[stream :: self.plan.streams],
            seed=self.config.seed,
            stream=stream,
            shuffle_buffer=self.config.data.shuffle_buffer,
            first=self.first_step * self.plan.chunk,
        )

    def _chunk(self, stream: int, samples: Iterator[tuple[int, Sample]]) -> Batch:
        batch = empty_batch(self.plan.chunk, self.config.model.image_size)
        for row in range(self.plan.chunk):
            index, sample = next(samples)
            seed = np.random.SeedSequence([self.config.seed, stream, index]).generate_state(1, np.uint64)
            image, label = decode_sample(sample, self.config.data, self.config.model.num_classes)
            size = self.config.model.image_size
            view = train_view(*image.shape[:2], size, self.config.data, draw_crops(seed)[0])
            _fill(batch, row, image, view, label, sample["__key__"])
        return batch


class _EvalChunks(IterableDataset):
    """This process's share of the evaluation samples in chunks, padded to the same number of chunks everywhere."""

    def __init__(self, config: Config, shards: list[str], chunk: int, rank: int, world_size: int) -> None:
        self.config, self.shards, self.chunk = config, shards, chunk
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch | UserError]:
        try:
            yield from self._chunks()
        except UserError as error:
            yield error

    def _chunks(self) -> Iterator[Batch]:
        index, processes = _process_of(self.rank, self.world_size)
        size, total, filled, given = self.config.model.image_size, 0, 0, 0
        batch = empty_batch(self.chunk, size)
        for total, sample in enumerate((s for shard in self.shards for s in read_shard(shard)), start=1):
            if (total - 1) % processes != index:
                continue
            image, label = decode_sample(sample, self.config.data, self.config.model.num_classes)
            view = eval_view(*image.shape[:2], size, self.config.data.eval_crop)
            _fill(batch, filled, image, view, label, sample["__key__"])
            filled += 1
            if filled == self.chunk:
                yield batch
                batch, filled, given = empty_batch(self.chunk, size), 0, given + 1
        if total == 0:
            raise UserError(f"the evaluation shards of data.eval ({self.config.data.eval}) hold no samples")
        # The whole is known to every process only now: the largest share decides the number of chunks.
        largest_share = -(-total // processes)
        while given * self.chunk < largest_share:
            yield batch
            batch, given = empty_batch(self.chunk, size), given + 1


def _process_of(rank: int, world_size: int) -> tuple[int, int]:
    """Index of this decoding process among those of all ranks, and their number; rank first, then worker."""
    worker = get_worker_info()
    number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
    return number * world_size + rank, workers * world_size


def _fill(batch: Batch, row: int, image: np.ndarray, view: View, label: int, key: str) -> None:
    render(image, view, 1, batch.images[row].numpy(), PixelBuffer())
    batch.labels[row] = label
    batch.weights[row] = 1
    batch.keys[row] = key


def _load(dataset: IterableDataset, num_workers: int, prefetch_chunks: int) -> Iterator[Batch]:
    """The chunks of `dataset` from its worker processes, in turn; raises the UserError that one hands over."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        prefetch_factor=prefetch_chunks if num_workers else None,
        generator=torch.Generator(),  # or the loader would draw from, and so move, the global generator
    )
    try:
        for chunk in loader:
            if isinstance(chunk, UserError):
                raise chunk
            yield chunk
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a data worker process was killed, most often for lack of host memory or of /dev/shm: "
            "lower data.shuffle_buffer or data.num_workers, or give the machine more of it"
        ) from error


def _unchanged(chunk: Any) -> Any:
    return chunk
