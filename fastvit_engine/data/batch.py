"""What the trainer gets: a batch of images, and how chunks of images become batches of an exact size."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvit_engine.config import Config
from fastvit_engine.data.decode import CorruptSample, Sample, read_image, read_label


class BadSample(NamedTuple):
    """A sample whose image cannot be used."""

    key: str
    shard: str
    reason: str  # "has ..."


class Batch(NamedTuple):
    """Images with their labels, on the host."""

    images: Tensor  # uint8 [B, H, W, 3], RGB
    labels: Tensor  # int64 [B]
    weights: Tensor  # float32 [B]: 1, or 0 for padding and bad samples, which are black and of label 0
    keys: list[str]  # B sample keys; "" for padding
    bad: tuple[BadSample, ...] = ()  # the bad samples that this batch or the chunks it was joined from came with


def empty_batch(size: int, image_size: int) -> Batch:
    """A batch of `size` padding images: black, label 0, weight 0."""
    return Batch(
        images=torch.zeros(size, image_size, image_size, 3, dtype=torch.uint8),
        labels=torch.zeros(size, dtype=torch.int64),
        weights=torch.zeros(size),
        keys=[""] * size,
    )


class BatchBuilder:
    """A batch that is filled sample by sample; what is not filled stays padding."""

    def __init__(self, size: int, config: Config) -> None:
        self._config = config
        self._batch = empty_batch(size, config.model.image_size)
        self._bad: list[BadSample] = []

    def add(self, row: int, sample: Sample, transform: Callable[[np.ndarray], np.ndarray]) -> None:
        """Decodes a sample into `row`, through `transform` from any uint8 [H, W, 3] to the batch's size."""
        label = read_label(sample, self._config.data, self._config.model.num_classes)
        try:
            image = transform(read_image(sample, self._config.data))
        except CorruptSample as error:
            self.add_bad(row, BadSample(sample["__key__"], sample["__url__"], str(error)))
            return
        self._batch.images[row] = torch.from_numpy(image)
        self._batch.labels[row] = label
        self._batch.weights[row] = 1
        self._batch.keys[row] = sample["__key__"]

    def add_bad(self, row: int, sample: BadSample) -> None:
        self._batch.keys[row] = sample.key
        self._bad.append(sample)

    def build(self) -> Batch:
        return self._batch._replace(bad=tuple(self._bad))


def rebatch(chunks: Iterable[Batch], size: int, pin_memory: bool) -> Iterator[Batch]:
    """Joins and cuts `chunks` into batches of exactly `size` images, in order; the last one is padded with weight 0."""
    parts: list[Batch] = []
    missing = size
    for chunk in chunks:
        start = 0
        while start < len(chunk.keys):
            cut = slice(start, start + missing)
            bad = chunk.bad if start == 0 else ()
            part = Batch(chunk.images[cut], chunk.labels[cut], chunk.weights[cut], chunk.keys[cut], bad)
            parts.append(part)
            start += len(part.keys)
            missing -= len(part.keys)
            if missing == 0:
                yield _join(parts, size, pin_memory)
                parts, missing = [], size
    if parts:
        parts.append(empty_batch(missing, image_size=parts[0].images.shape[1]))
        yield _join(parts, size, pin_memory)


def _join(parts: list[Batch], size: int, pin_memory: bool) -> Batch:
    # Images go straight into (pinned) memory of their own: one copy, and the chunks' shared memory is free again.
    images = torch.empty(size, *parts[0].images.shape[1:], dtype=torch.uint8, pin_memory=pin_memory)
    torch.cat([part.images for part in parts], out=images)
    labels = torch.cat([part.labels for part in parts])
    weights = torch.cat([part.weights for part in parts])
    if pin_memory:
        labels, weights = labels.pin_memory(), weights.pin_memory()
    keys = [key for part in parts for key in part.keys]
    return Batch(images, labels, weights, keys, tuple(bad for part in parts for bad in part.bad))
