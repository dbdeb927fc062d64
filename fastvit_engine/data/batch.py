"""What the trainer gets: a batch of images, and how chunks of images become batches of an exact size."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Images with their labels, on the host."""

    images: Tensor  # uint8 [B, H, W, 3], RGB
    labels: Tensor  # int64 [B]
    weights: Tensor  # float32 [B]: 1, or 0 for padding
    keys: list[str]  # B sample keys; "" for padding


def empty_batch(size: int, image_size: int) -> Batch:
    """A batch of `size` padding images: black, label 0, weight 0."""
    return Batch(
        images=torch.zeros(size, image_size, image_size, 3, dtype=torch.uint8),
        labels=torch.zeros(size, dtype=torch.int64),
        weights=torch.zeros(size),
        keys=[""] * size,
    )


def rebatch(chunks: Iterable[Batch], size: int, pin_memory: bool) -> Iterator[Batch]:
    """Joins and cuts `chunks` into batches of exactly `size` images, in order; the last one is padded with weight 0."""
    parts: list[Batch] = []
    missing = size
    for chunk in chunks:
        start = 0
        while start < len(chunk.keys):
            cut = slice(start, start + missing)
            part = Batch(chunk.images[cut], chunk.labels[cut], chunk.weights[cut], chunk.keys[cut])
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
    return Batch(images, labels, weights, [key for part in parts for key in part.keys])
