"""What the trainer gets: a batch of images with their labels, and how it is filled sample by sample."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvit_engine.config import Config
from fastvit_engine.data.pixels.compressed import pixels_in
from fastvit_engine.data.pixels.crops import View
from fastvit_engine.data.pixels.decode import Decode, PixelBuffer, open_image
from fastvit_engine.data.pixels.views import (
    cut_views,
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
    image_member,
    name_of,
    read_labels,
    read_soft_label,
    unreadable,
)
from fastvit_engine.errors import UserError

_TOGETHER = 16  # images that are opened, and then decoded
_TOGETHER_BYTES = 1 << 24  # of them at most, but for the last: images of any size would need memory without bound


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


class _Opened(NamedTuple):
    """A sample whose image is still to be decoded."""

    row: int
    sample: Sample
    member: str  # that holds its image
    views: Sequence[View]
    decode: Decode


class BatchBuilder:
    """A batch that is filled sample by sample; rows that are not filled stay padding.

    Samples are opened and then decoded several at a time: of what decoding an image needs, hardly anything that opening
    the next one needs is left in the processor's caches.
    """

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
        self._padding = -1 if self._labels.ndim > 1 and self._labels.dtype == np.int64 else 0  # a label of no sample
        self.seeds = batch.seeds
        self._bad: list[tuple[int, BadSample]] = []  # with their rows
        self._opened: deque[_Opened] = deque()
        self._opened_bytes = 0
        self._seconds = [0.0, 0.0, 0.0]
        self._mark = time.perf_counter()

    def add(self, row: int, sample: Sample, choose: Callable[[int, int], Sequence[View]]) -> None:
        """Decodes into `row` the views that `choose` makes of a sample's image, given its height and width.

        A sample without a usable image becomes a bad one. Raises UserError for labels that are not usable.
        """
        try:
            self._label(row, sample)
        except Unusable as problem:
            raise UserError(f"{name_of(sample)} {problem.reason}: {problem.remedy}") from problem
        self._weights[row] = 1
        self._batch.keys[row] = sample["__key__"]
        self._end_stage(0)
        try:
            self._open(row, sample, choose)
        except Unusable as problem:
            self._leave_out(row, sample, problem)
        self._end_stage(1)
        if len(self._opened) == _TOGETHER or self._opened_bytes >= _TOGETHER_BYTES:
            self._draw_opened()

    def add_bad(self, row: int, sample: BadSample) -> None:
        self._weights[row] = 0
        self._batch.keys[row] = sample.key
        self._bad.append((row, sample))

    def build(self) -> Batch:
        self._end_stage(0)
        self._draw_opened()
        unused = self._weights == 0
        self._images[unused], self._labels[unused] = 0, self._padding
        bad = tuple(sample for _, sample in sorted(self._bad))
        return self._batch._replace(bad=bad, seconds=StageSeconds(*self._seconds))

    def _label(self, row: int, sample: Sample) -> None:
        soft = read_soft_label(sample, self._num_classes) if self._labels.dtype == np.float32 else None
        if soft is not None:
            self._labels[row] = soft.dense(self._num_classes)
            return
        labels = read_labels(sample, self._keys, self._num_classes)
        if self._labels.dtype == np.float32:
            self._labels[row, labels[0]] = 1
        elif self._labels.ndim == 1:
            self._labels[row] = labels[0]
        else:
            self._labels[row, : len(labels)] = labels

    def _open(self, row: int, sample: Sample, choose: Callable[[int, int], Sequence[View]]) -> None:
        member = image_member(sample, self._keys)
        try:
            image = open_image(sample[member], self._keys.max_pixels)
            views = choose(image.height, image.width)
            if not (self._compressed and leave_compressed(image, views[0], self._images[row])):
                self._opened.append(_Opened(row, sample, member, views, cut_views(image, views)))
                self._opened_bytes += len(sample[member])
        except ValueError as error:
            raise unreadable(member, error) from error

    def _draw_opened(self) -> None:
        while self._opened:  # each is let go once it is drawn: Pillow keeps the pixels of an image that it has decoded
            row, sample, member, views, decode = self._opened.popleft()
            try:
                decoded = decode(self._workspace.decoded)
                self._end_stage(1)
                out = pixels_in(self._images[row], self._sizes[0]) if self._compressed else self._images[row]
                render_views(decoded, views, self._sizes, out, self._workspace.resized)
                self._end_stage(2)
            except ValueError as error:
                self._leave_out(row, sample, unreadable(member, error))
        self._opened_bytes = 0

    def _leave_out(self, row: int, sample: Sample, problem: Unusable) -> None:
        self.add_bad(row, BadSample(sample["__key__"], sample["__url__"], problem.reason))

    def _end_stage(self, stage: int) -> None:
        now = time.perf_counter()
        self._seconds[stage] += now - self._mark
        self._mark = now


def targets(labels: Tensor, num_classes: int) -> Tensor:
    """Labels as losses take them: indices [B] and probabilities as they are; [B, L] as float32 [B, C] of 0 and 1."""
    if labels.ndim == 1 or labels.is_floating_point():
        return labels
    hot = torch.zeros(len(labels), num_classes + 1, device=labels.device)  # the last column is for what is no label
    return hot.scatter_(1, labels.where(labels >= 0, num_classes), 1.0)[:, :num_classes].contiguous()
