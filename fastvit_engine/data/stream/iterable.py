"""Training data from an iterable of the user's own, such as a WebDataset pipeline or a DataLoader."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastvit_engine.config import Config, DataConfig
from fastvit_engine.data.pixels.draws import sample_seeds
from fastvit_engine.data.shards.usable import SampleKeys
from fastvit_engine.data.stream.batch import Batch, LabelForm, empty_batch
from fastvit_engine.data.stream.batch_split import possible_splits
from fastvit_engine.data.stream.rebatch import micro_batches, rebatch
from fastvit_engine.data.stream.skip import Window, step_starts
from fastvit_engine.data.stream.source import EvaluationData, ImageSizeOf, TrainingData
from fastvit_engine.errors import UserError

_YIELD = 'yield (image, label), batches of them, or dicts with "image" and "label"'


class Share(NamedTuple):
    """Which part of the data a process is to iterate over."""

    rank: int
    world_size: int  # number of ranks
    consumed: int  # samples that the whole run has trained on so far


Samples = Iterable[Any] | Callable[[Share], Iterable[Any]]


class IterableData(TrainingData):
    """Wraps an iterable as training data.

    Items are (image, label) or dicts {"image": ..., "label": ...}. A dict may instead name its members as
    data.image_key and data.label_key do ("jpg", "cls", ...), and may hold a "__key__". An image is uint8 RGB,
    [S, S, 3] or [3, S, S] with S = model.image_size, already cropped and augmented: an array, a tensor or a Pillow
    image. A label is a class index, or up to data.max_labels of them. Items may also be batches: images [B, S, S, 3] or
    [B, 3, S, S], and labels [B], or [B, L] filled up with -1. Mixup, CutMix, RandAugment and normalisation remain the
    engine's.

    Every rank iterates over its own share, under every ZeRO stage, because each rank trains on different images. What
    the share is, the iterable knows from the environment (RANK and WORLD_SIZE, as in any torchrun job), or the function
    that makes it from its argument: `IterableData(lambda share: pipeline(share.rank, share.world_size))`.

    The order is the iterable's. A resumed run begins a new iteration, so samples may repeat or be missed, unless the
    function honours `share.consumed`. When an iteration ends, the next one begins; an iterator that is used up ends the
    run with an error.
    """

    def __init__(
        self,
        samples: Samples | None,
        *,
        samples_per_epoch: int | None = None,
        class_names: list[str] | None = None,
        evaluation: EvaluationData | None = None,
    ) -> None:
        """`samples_per_epoch`: of all ranks together; what durations in epochs refer to. `evaluation`: data.eval."""
        self._samples = samples
        self.samples_per_epoch, self.class_names, self.evaluation = samples_per_epoch, class_names, evaluation

    def with_evaluation(
        self, config: Config, evaluation: EvaluationData | None, class_names: list[str] | None
    ) -> "IterableData":
        """The same, with evaluation data and its class names, and with data.train_samples as its epoch if it is set."""
        names = self.class_names or class_names
        epoch = config.data.train_samples or self.samples_per_epoch
        return IterableData(self._samples, samples_per_epoch=epoch, class_names=names, evaluation=evaluation)

    def bind(self, own: TrainingData | None) -> "IterableData":
        """The same, as it came from the main process, with the iterable of this one."""
        assert isinstance(own, IterableData)
        return IterableData(
            own._samples,
            samples_per_epoch=self.samples_per_epoch,
            class_names=self.class_names,
            evaluation=self.evaluation,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_samples": None}  # each process has its own

    def fingerprint(self, data: DataConfig) -> dict[str, Any]:
        return {"order": "iterable"}

    def describe(self) -> str:
        return (
            "reading an iterable of your own: each rank iterates over its own share, and a resumed run does not repeat "
            "the order (samples may come twice or not at all)"
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
        """See TrainingData. Skipped windows count as consumed, but nothing is left out of the iterable.

        Images have model.image_size in every step: a run that wants others is refused before.
        """
        split = next(possible_splits(config, world_size, micro_batch_size))
        if self._samples is None:
            raise RuntimeError("this process has no iterable: see IterableData.bind")
        share, own = Share(rank, world_size, consumed), split.positions(rank)
        chunks, sizes = self._chunks(self._samples, config, share, own, skipped), split.micro_batches(rank)
        return micro_batches(rebatch(chunks, sizes, pin_memory), sizes, config, pin_memory)

    def eval_batches(
        self, config: Config, *, rank: int, world_size: int, batch_size: int, pin_memory: bool
    ) -> Iterator[Batch]:
        assert self.evaluation is not None  # data.eval is set
        return self.evaluation.eval_batches(
            config, rank=rank, world_size=world_size, batch_size=batch_size, pin_memory=pin_memory
        )

    def _chunks(
        self, samples: Samples, config: Config, share: Share, own: np.ndarray, skipped: Sequence[Window]
    ) -> Iterator[Batch]:
        """Each item as a batch, with the positions in the run that this rank's next samples have."""
        batch_size = config.train.global_batch_size
        starts = step_starts(share.consumed, batch_size, skipped)
        positions = np.empty(0, np.int64)
        while True:
            iterable = samples(share) if callable(samples) else samples
            iterator = iter(iterable)
            given = steps = 0  # samples of this rank, and whole steps of the run
            for number, item in enumerate(iterator):
                batch = to_batch(item, config, f"item {number} of the training data")
                while len(positions) < len(batch.keys):
                    positions = np.concatenate([positions, next(starts) + own])
                current, positions = np.split(positions, [len(batch.keys)])
                batch.seeds[:] = sample_seeds(config.seed, 0, 0, current)
                batch.keys[:] = [key or f"position-{at}" for key, at in zip(batch.keys, current.tolist(), strict=True)]
                steps = (int(current[-1]) - share.consumed) // batch_size + (len(positions) % len(own) == 0)
                given += len(batch.keys)
                yield batch
            if given < len(own):
                raise UserError(
                    f"the iterable of training data gave {given} samples before it ended, fewer than the {len(own)} "
                    "that one step takes from each rank: give every rank more samples, or lower train.global_batch_size"
                )
            if iterator is iterable and not callable(samples):
                raise UserError(
                    f"the iterator of training data was used up after {given:,} samples, before the run had ended: "
                    "give an endless one, an iterable that can be iterated over again, or a function that makes one"
                )
            share = share._replace(consumed=share.consumed + steps * batch_size)


def to_batch(item: Any, config: Config, name: str) -> Batch:
    """A sample, or a batch of samples, of a user's iterable; see IterableData.

    Keys are "" if the item has none. Raises UserError that says what `name` is and what it should be.
    """
    labelled = config.model.num_classes > 0
    image, labels, keys = _parts(item, SampleKeys.of(config.data), name, labelled=labelled)
    images = _images(image, config.model.image_size, name)
    single = images.ndim == 3
    if not labelled:
        labels = 0 if single else [0] * len(images)
    if single:
        images, labels, keys = images[None], [_plain(labels, name)], [keys]
    else:
        labels = _plain(labels, name)
    if not isinstance(labels, list) or len(labels) != len(images) or not len(images):
        raise UserError(f"{name} has {len(images)} images and labels {_short(labels)}: give one label per image")
    batch = empty_batch(len(images), 0, LabelForm.of(config, training=False))._replace(
        images=images, weights=torch.ones(len(images)), keys=_keys(keys, len(images), name)
    )
    for row, label in enumerate(labels):
        entries = [0] if not labelled else _checked([label] if not isinstance(label, list) else label, config, name)
        if batch.labels.ndim == 1:
            batch.labels[row] = entries[0]
        else:
            batch.labels[row, : len(entries)] = torch.tensor(entries)
    return batch


def _parts(item: Any, keys: SampleKeys, name: str, *, labelled: bool) -> tuple[Any, Any, Any]:
    """Splits an item into (image or images, label or labels, key or keys or None). Not `labelled`: may lack labels."""
    if isinstance(item, Mapping):
        image = next((item[key] for key in ("image", "images", *keys.images) if key in item), None)
        label = next((item[key] for key in ("label", "labels") if key in item), None)
        if label is None:
            label = item.get(keys.label_member)
            for field in keys.label_path:
                label = label.get(field) if isinstance(label, Mapping) else None
        if image is None or (label is None and labelled):
            missing = "image" if image is None else "label"
            raise UserError(f"{name} has no {missing}, only {', '.join(map(str, item))}: {_YIELD}")
        return image, label, item.get("__key__")
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1], None
    kind = f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, tuple | list) else "")
    raise UserError(f"{name} is {kind}: {_YIELD}")


def _images(image: Any, size: int, name: str) -> Tensor:
    """Checks an image or a batch of them; returns uint8 [S, S, 3] or [B, S, S, 3]."""
    if isinstance(image, Image.Image):
        image = np.array(image)
    if not isinstance(image, np.ndarray | Tensor):
        raise UserError(f"{name} has an image of type {type(image).__name__}: decode it to an array uint8 [H, W, 3]")
    if isinstance(image, np.ndarray) and (not image.flags.writeable or min(image.strides, default=0) < 0):
        image = image.copy()  # PyTorch warns of the one and refuses the other, such as image[:, ::-1]
    images = torch.as_tensor(image)
    if images.dtype != torch.uint8:
        raise UserError(
            f"{name} has an image of {str(images.dtype).removeprefix('torch.')}: give uint8, 0 to 255, which the "
            "engine normalises with data.mean and data.std"
        )
    if images.ndim in (3, 4):
        if tuple(images.shape[-3:]) == (size, size, 3):
            return images
        if tuple(images.shape[-3:]) == (3, size, size):
            return images.movedim(-3, -1)
    raise UserError(
        f"{name} has an image of shape {list(images.shape)}: crop or resize it to [{size}, {size}, 3] or "
        f"[3, {size}, {size}], or set model.image_size"
    )


def _plain(labels: Any, name: str) -> Any:
    """Labels as numbers and lists."""
    if isinstance(labels, Tensor | np.ndarray | np.generic):
        return labels.tolist()
    if isinstance(labels, tuple | list):
        return [_plain(label, name) for label in labels]
    return labels


def _checked(labels: list[Any], config: Config, name: str) -> list[int]:
    labels = [label for label in labels if type(label) is not int or label != -1]  # what lists are filled up with
    if not all(type(label) is int for label in labels):
        raise UserError(f"{name} has the label {_short(labels)}: give class indices, as integers")
    if not 1 <= len(labels) <= config.data.max_labels:
        remedy = f"set data.max_labels={len(labels)} and loss.kind=sigmoid" if labels else "give it one"
        raise UserError(f"{name} has {len(labels)} labels, and training takes 1 to {config.data.max_labels}: {remedy}")
    for label in labels:
        if not 0 <= label < config.model.num_classes:
            remedy = f"correct it or set model.num_classes={label + 1} or more" if label >= 0 else "correct it"
            raise UserError(f"{name} has label {label}, outside 0..{config.model.num_classes - 1}: {remedy}")
    return labels


def _keys(keys: Any, count: int, name: str) -> list[str]:
    if keys is None or keys == [None]:
        return [""] * count
    if not isinstance(keys, list | tuple) or len(keys) != count or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{name} has the keys {_short(keys)} for {count} images: give one text per image")
    return list(keys)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
