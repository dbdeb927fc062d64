"""Chunks of images become batches of an exact size."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from fastvit_engine.config import Config
from fastvit_engine.data.stream.batch import Batch, LabelForm, empty_training_batch
from fastvit_engine.data.stream.batch_memory import BatchMemory


def micro_batches(batches: Iterator[Batch], sizes: Sequence[int], config: Config, pin_memory: bool) -> Iterator[Batch]:
    """The micro-batches of a rank, step by step: `batches`, and one image of padding for each size of 0.

    sizes: see `BatchSplit.micro_batches`. If all are 0, `batches` is left alone.
    """
    if all(sizes):
        yield from batches
        return
    padding = empty_training_batch(1, config)
    if pin_memory:
        images, labels, weights = (tensor.pin_memory() for tensor in padding[:3])
        padding = padding._replace(images=images, labels=labels, weights=weights)
    for size in cycle(sizes):
        batch = next(batches, None) if size else padding
        if batch is None:
            return
        yield batch


def rebatch(chunks: Iterable[Batch], size: int | Sequence[int], pin_memory: bool) -> Iterator[Batch]:
    """Joins and cuts `chunks` into batches of exactly `size` images, in order; the last one is padded with weight 0.

    Several sizes take turns, but for those of 0. A chunk is copied when it comes, and its memory is free again when the
    next one is asked for.
    """
    sizes = [size] if isinstance(size, int) else [one for one in size if one]
    memory, turns = BatchMemory(pin_memory, max(sizes)), cycle(sizes)
    batch, filled, whole = None, 0, 0
    for chunk in chunks:
        start = 0
        while start < len(chunk.keys):
            if batch is None:
                whole = next(turns)
                batch, filled = _unfilled(whole, chunk, memory), 0
            count = min(whole - filled, len(chunk.keys) - start)
            to, cut = slice(filled, filled + count), slice(start, start + count)
            batch.images[to] = chunk.images[cut]
            batch.labels[to] = chunk.labels[cut]
            batch.weights[to] = chunk.weights[cut]
            batch.keys[to] = chunk.keys[cut]
            batch.seeds[to] = chunk.seeds[cut]
            if start == 0:
                batch = batch._replace(bad=batch.bad + chunk.bad, seconds=batch.seconds.plus(chunk.seconds))
            start, filled = start + count, filled + count
            if filled == whole:
                yield batch
                batch = None
    if batch is not None:
        batch.images[filled:] = 0
        yield batch


def _form_of(labels: Tensor) -> LabelForm:
    columns = 1 if labels.ndim == 1 else labels.shape[1]
    return LabelForm(soft_classes=columns) if labels.is_floating_point() else LabelForm(columns)


def _unfilled(size: int, chunk: Batch, memory: BatchMemory) -> Batch:
    """Padding in the form of `chunk`, but for its images, which may be anything."""
    labels = _form_of(chunk.labels).unlabelled(size)
    pin_memory = memory.pin_memory
    return Batch(
        images=memory.reserve(size, *chunk.images.shape[1:]),
        labels=labels.pin_memory() if pin_memory else labels,
        weights=torch.zeros(size, pin_memory=pin_memory),
        keys=[""] * size,
        seeds=np.zeros(size, np.int64),
    )
