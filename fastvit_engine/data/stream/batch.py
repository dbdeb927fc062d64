"""What the trainer gets: a batch of images, and how chunks of images become batches of an exact size."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvit_engine.config import Config
from fastvit_engine.data.pixels.compressed import pixels_in
from fastvit_engine.data.pixels.crops import View
from fastvit_engine.data.pixels.decode import PixelBuffer, open_image
from fastvit_engine.data.pixels.views import (
    decode_views,
    eval_shape,
    images_shape,
    leave_compressed,
    render_views,
    training_views,
)
from fastvit_engine.data.shards.sample import Sample
from fastvit_engine.data.shards.usable import (
    SampleKeys,
    Unusable,
    name_of,
    read_image,
    read_labels,
    read_soft_label,
)
from fastvit_engine.errors import UserError


class BadSample(NamedTuple):
    """A sample whose image cannot be used."""

    key: str
    shard: str
    reason: str  # "has ..."


class StageSeconds(NamedTuple):
    """Where the time of decoding processes went."""

    read: float = 0.0  # finding a sample, getting its bytes and its label
    decode: float = 0.0
    augment: float = 0.0

    def plus(self, other: "StageSeconds") -> "StageSeconds":
        return StageSeconds(*(a + b for a, b in zip(self, other, strict=True)))


class Batch(NamedTuple):
    """Images with their labels, on the host."""

    # uint8 [B, H, W, 3], RGB; or, in training that compares views of an image, [B, N]: see `unpack_views`; or, at the
    # images' own proportions, [B, K]: see `packed_image`
    images: Tensor
    # int64 [B]; with data.max_labels = L above 1, [B, L], filled up with -1; with data.soft_labels, in training,
    # float32 [B, C]: the probability of each class
    labels: Tensor
    weights: Tensor  # float32 [B]: 1, or 0 for padding and bad samples, which are black and of label 0
    keys: list[str]  # B sample keys; "" for padding
    seeds: np.ndarray  # int64 [B], of what is random about each sample; in evaluation, its position among all
    # Of this batch, or of the chunks whose beginning is in it:
    bad: tuple[BadSample, ...] = ()
    seconds: StageSeconds = StageSeconds()


class LabelForm(NamedTuple):
    """How many labels a sample of a batch has, and which."""

    most: int = 1  # class indices
    soft_classes: int = 0  # probabilities of so many classes instead; 0: indices

    @classmethod
    def of(cls, config: Config, *, training: bool) -> "LabelForm":
        """Evaluation is by class indices, whatever is learned."""
        soft = training and bool(config.data.soft_labels)
        return cls(config.data.max_labels, config.model.num_classes if soft else 0)

    def unlabelled(self, size: int) -> Tensor:
        """The labels of `size` padding images."""
        if self.soft_classes:
            return torch.zeros(size, self.soft_classes)
        if self.most == 1:
            return torch.zeros(size, dtype=torch.int64)
        return torch.full((size, self.most), -1, dtype=torch.int64)


ONE_CLASS = LabelForm()


def empty_batch(size: int, image_size: int, labels: LabelForm = ONE_CLASS) -> Batch:
    """A batch of `size` padding images: black, label 0, weight 0."""
    return Batch(
        images=torch.zeros(size, image_size, image_size, 3, dtype=torch.uint8),
        labels=labels.unlabelled(size),
        weights=torch.zeros(size),
        keys=[""] * size,
        seeds=np.zeros(size, np.int64),
    )


def empty_training_batch(size: int, config: Config, image_size: int | None = None) -> Batch:
    """As `empty_batch`, in the form of the batches that training takes. image_size: as in `training_views`."""
    padding = empty_batch(size, 0, LabelForm.of(config, training=True))
    shape = images_shape(training_views(config, image_size), compressed=leaves_compressed(config))
    return padding._replace(images=torch.zeros(size, *shape, dtype=torch.uint8))


def leaves_compressed(config: Config) -> bool:
    """Whether training batches hold images as in `compressed`."""
    return config.data.decoder == "nvjpeg"


def empty_eval_batch(size: int, config: Config) -> Batch:
    """As `empty_batch`, in the form of the batches that evaluation takes."""
    padding = empty_batch(size, 0, LabelForm.of(config, training=False))
    return padding._replace(images=torch.zeros(size, *eval_shape(config), dtype=torch.uint8))


class Workspace:
    """Memory that a decoding process uses again and again."""

    def __init__(self) -> None:
        self.decoded, self.resized = PixelBuffer(), PixelBuffer()


class BatchBuilder:
    """A batch that is filled sample by sample; rows that are not filled stay padding."""

    def __init__(
        self,
        batch: Batch,
        config: Config,
        workspace: Workspace,
        sizes: Sequence[int] | None = None,
        *,
        compressed: bool = False,
    ) -> None:
        """`batch` is padding so far (see `empty_batch`) but for its images, which may be anything.

        sizes: sides of the views of each image; None: one of model.image_size. compressed: the GPU decodes what it can.
        """
        self._batch, self._workspace, self._compressed = batch, workspace, compressed
        self._sizes = [config.model.image_size] if sizes is None else sizes
        self._keys, self._num_classes = SampleKeys.of(config.data), config.model.num_classes
        # NumPy's views of it: setting an element of a tensor takes microseconds.
        self._images, self._labels, self._weights = (tensor.numpy() for tensor in batch[:3])
        self.seeds = batch.seeds
        self._bad: list[BadSample] = []
        self._seconds = [0.0, 0.0, 0.0]
        self._mark = time.perf_counter()

    def add(self, row: int, sample: Sample, choose: Callable[[int, int], Sequence[View]]) -> None:
        """Decodes into `row` the views that `choose` makes of a sample's image, given its height and width.

        A sample without a usable image becomes a bad one. Raises UserError for labels that are not usable.
        """
        try:
            soft = read_soft_label(sample, self._num_classes) if self._labels.dtype == np.float32 else None
            labels = read_labels(sample, self._keys, self._num_classes) if soft is None else []
        except Unusable as problem:
            raise UserError(f"{name_of(sample)} {problem.reason}: {problem.remedy}") from problem
        self._end_stage(0)
        try:
            read_image(sample, self._keys, partial(self._draw, row, choose))
        except Unusable as problem:
            self.add_bad(row, BadSample(sample["__key__"], sample["__url__"], problem.reason))
            return
        if soft is not None:
            self._labels[row] = soft.dense(self._num_classes)
        elif self._labels.dtype == np.float32:
            self._labels[row, labels[0]] = 1
        elif self._labels.ndim == 1:
            self._labels[row] = labels[0]
        else:
            self._labels[row, : len(labels)] = labels
        self._weights[row] = 1
        self._batch.keys[row] = sample["__key__"]

    def add_bad(self, row: int, sample: BadSample) -> None:
        self._batch.keys[row] = sample.key
        self._bad.append(sample)

    def build(self) -> Batch:
        self._images[self._weights == 0] = 0
        return self._batch._replace(bad=tuple(self._bad), seconds=StageSeconds(*self._seconds))

    def _draw(self, row: int, choose: Callable[[int, int], Sequence[View]], data: bytes) -> None:
        image = open_image(data, self._keys.max_pixels)
        views, out = choose(image.height, image.width), self._images[row]
        if self._compressed:
            if leave_compressed(image, views[0], out):
                self._end_stage(1)
                return
            out = pixels_in(out, self._sizes[0])
        decoded = decode_views(image, views, self._workspace.decoded)
        self._end_stage(1)
        render_views(decoded, views, self._sizes, out, self._workspace.resized)
        self._end_stage(2)

    def _end_stage(self, stage: int) -> None:
        now = time.perf_counter()
        self._seconds[stage] += now - self._mark
        self._mark = now


def micro_batches(chunks: Iterable[Batch], sizes: Sequence[int], config: Config, pin_memory: bool) -> Iterator[Batch]:
    """Joins and cuts `chunks` into the micro-batches of a rank, step by step; see `BatchSplit.micro_batches`.

    A micro-batch of size 0 becomes one image of padding. If all are, `chunks` is left alone.
    """
    given = [size for size in sizes if size]
    if len(given) == len(sizes):
        yield from rebatch(chunks, sizes, pin_memory)
        return
    padding = empty_training_batch(1, config)
    if pin_memory:
        images, labels, weights = (tensor.pin_memory() for tensor in padding[:3])
        padding = padding._replace(images=images, labels=labels, weights=weights)
    batches = rebatch(chunks, given, pin_memory)
    for size in cycle(sizes):
        batch = next(batches, None) if size else padding
        if batch is None:
            return
        yield batch


def rebatch(chunks: Iterable[Batch], size: int | Sequence[int], pin_memory: bool) -> Iterator[Batch]:
    """Joins and cuts `chunks` into batches of exactly `size` images, in order; the last one is padded with weight 0.

    Several sizes take turns. A chunk is copied when it comes, and its memory is free again when the next one is asked
    for.
    """
    sizes = [size] if isinstance(size, int) else size
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


def targets(labels: Tensor, num_classes: int) -> Tensor:
    """Labels as losses take them: indices [B] and probabilities as they are; [B, L] as float32 [B, C] of 0 and 1."""
    if labels.ndim == 1 or labels.is_floating_point():
        return labels
    hot = torch.zeros(len(labels), num_classes + 1, device=labels.device)  # the last column is for what is no label
    return hot.scatter_(1, labels.where(labels >= 0, num_classes), 1.0)[:, :num_classes].contiguous()


class BatchMemory:
    """Memory for the images of batches; that of a batch which nobody holds any more is used again.

    New memory costs a page fault every 4 kB, more time than to fill it. PyTorch itself uses pinned memory again, once
    the device has read it; other memory is free here when it has no reference left but this one.
    """

    def __init__(self, pin_memory: bool, most: int) -> None:
        """`most`: images of the largest batch."""
        self.pin_memory, self.most = pin_memory, most
        self._kept: list[np.ndarray] = []

    def reserve(self, images: int, *shape: int) -> Tensor:
        """uint8 [images, *shape] with any content. With another `shape` than before, the memory so far is let go."""
        if self.pin_memory:
            return torch.empty((images, *shape), dtype=torch.uint8, pin_memory=True)
        if self._kept and self._kept[0].shape[1:] != shape:
            self._kept.clear()
        for number in range(len(self._kept)):
            if sys.getrefcount(self._kept[number]) == 2:  # the list's, and the argument's
                return torch.from_numpy(self._kept[number])[:images]
        self._kept.append(np.empty((self.most, *shape), np.uint8))
        return torch.from_numpy(self._kept[-1])[:images]


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
