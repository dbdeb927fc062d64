"""Whether a sample can be used: its labels and its image, or what is wrong with them.

Training, `fastvit data verify`, `stats`, `show` and `bench` all ask here, so that they cannot disagree.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

from fastvit_engine.config import DataConfig
from fastvit_engine.data.shards.labels import label_member, parse_labels
from fastvit_engine.data.shards.sample import Sample
from fastvit_engine.data.shards.soft_labels import SOFT_MEMBER, SoftLabel, soft_label_of
from fastvit_engine.shown import shown

T = TypeVar("T")

PLAUSIBLE_CLASSES = 10_000_000  # bound of labels if nothing says how many classes there are
MISSING, WRONG_LABEL, UNREADABLE = "missing member", "wrong label", "unreadable image"


class Unusable(Exception):
    """A sample without usable labels, or without a usable image."""

    def __init__(self, kind: str, reason: str, remedy: str) -> None:
        super().__init__(kind, reason, remedy)
        self.kind = kind  # MISSING, WRONG_LABEL or UNREADABLE
        self.reason = reason  # "has ...", which the name of the sample goes before
        self.remedy = remedy

    def __str__(self) -> str:
        return self.reason


class SampleKeys(NamedTuple):
    """Which members hold the image and the labels of a sample, and how many labels and pixels there may be."""

    image_key: str  # data.image_key
    images: tuple[str, ...]  # its members
    label_key: str  # data.label_key
    label_member: str
    label_path: list[str]
    max_labels: int
    max_pixels: int  # of an image

    @classmethod
    def of(cls, data: DataConfig) -> "SampleKeys":
        return _keys(data.image_key, data.label_key, data.max_labels, data.max_pixels)


@lru_cache
def _keys(image_key: str, label_key: str, max_labels: int, max_pixels: int) -> SampleKeys:
    images = tuple(image_key.split(";"))
    return SampleKeys(image_key, images, label_key, *label_member(label_key), max_labels, max_pixels)


class Judged(NamedTuple, Generic[T]):
    """A sample's labels and image as far as they are usable; it can train a classifier if there is no problem."""

    labels: list[int] | None
    soft: SoftLabel | None  # None too if there is none, which is no problem
    image: T | None
    problems: list[Unusable]


def judge(sample: Sample, keys: SampleKeys, num_classes: int, decode: Callable[[bytes], T]) -> Judged[T]:
    """What of a sample is usable, and why the rest is not; `decode` raises ValueError for what is not an image."""
    labels: list[int] | None = None
    soft: SoftLabel | None = None
    image: T | None = None
    problems = []
    try:
        labels = read_labels(sample, keys, num_classes)
    except Unusable as problem:
        problems.append(problem)
    try:
        soft = read_soft_label(sample, num_classes)
    except Unusable as problem:
        problems.append(problem)
    try:
        image = read_image(sample, keys, decode)
    except Unusable as problem:
        problems.append(problem)
    return Judged(labels, soft, image, problems)


def read_labels(sample: Sample, keys: SampleKeys, num_classes: int) -> list[int]:
    """The class indices of a sample, 1 to data.max_labels of them, each below num_classes. Raises Unusable.

    Without classes the label is 0: what the sample has, if anything, is not read.
    """
    if num_classes == 0:
        return [0]
    content = sample.get(keys.label_member)
    if content is None:
        raise Unusable(
            MISSING,
            f"has no '{keys.label_member}' member, only {member_names(sample)}",
            "correct it or set data.label_key",
        )
    try:
        labels = parse_labels(content, keys.label_path)
    except ValueError:
        raise Unusable(
            WRONG_LABEL,
            f"has the label {content[:100]!r} in '{keys.label_key}', which is not a class index",
            "correct the shard or set data.label_key to the member that holds it",
        ) from None
    if not 1 <= len(labels) <= keys.max_labels:
        raise Unusable(
            WRONG_LABEL,
            f"has {len(labels)} labels in '{keys.label_key}', and training takes 1 to {keys.max_labels}",
            f"set data.max_labels={len(labels)} and loss.kind=sigmoid, or correct the shard"
            if labels
            else "correct the shard or set data.label_key to the member that holds the labels",
        )
    for label in labels:
        if not 0 <= label < num_classes:
            raise Unusable(
                WRONG_LABEL,
                f"has label {label}, outside 0..{num_classes - 1}",
                f"correct the shard or set model.num_classes={label + 1} or more"
                if label >= 0
                else "correct the shard",
            )
    return labels


def read_soft_label(sample: Sample, num_classes: int) -> SoftLabel | None:
    """The soft label of a sample, of up to num_classes classes; None if it has none. Raises Unusable.

    Without classes there is none: it is not read.
    """
    if num_classes == 0:
        return None
    try:
        soft = soft_label_of(sample)
    except ValueError as error:
        raise Unusable(
            WRONG_LABEL,
            f"has soft labels in '{SOFT_MEMBER}' that {error}",
            "label the images again (fastvit data label)",
        ) from None
    if soft is not None and soft.num_classes > num_classes:
        raise Unusable(
            WRONG_LABEL,
            f"has soft labels of {soft.num_classes} classes, and there are {num_classes}",
            f"set model.num_classes={soft.num_classes}, or label the images with a teacher of {num_classes} classes",
        )
    return soft


def read_image(sample: Sample, keys: SampleKeys, decode: Callable[[bytes], T]) -> T:
    """What `decode` makes of a sample's image. Raises Unusable if there is none, or if `decode` raises ValueError."""
    name = image_member(sample, keys)
    try:
        return decode(sample[name])
    except ValueError as error:
        raise unreadable(name, error) from error


def image_member(sample: Sample, keys: SampleKeys) -> str:
    """Which member holds a sample's image. Raises Unusable if none does."""
    for name in keys.images:
        if name in sample:
            return name
    raise Unusable(
        MISSING,
        f"has no '{keys.image_key}' member, only {member_names(sample)}",
        "set data.image_key to the shards' extension, or make the shards again",
    )


def unreadable(name: str, error: ValueError) -> Unusable:
    """What is wrong with a sample whose image, in a member of this name, could not be decoded."""
    return Unusable(
        UNREADABLE,
        f"has an image in '{name}' that cannot be decoded ({error})",
        "raise data.max_pixels, or leave such images out of the shards"
        if "of data.max_pixels" in str(error)
        else "set data.image_key to the shards' extension, or make the shards again",
    )


def member_names(sample: Sample) -> list[str]:
    return [name for name in sample if not name.startswith("__")]


def name_of(sample: Sample) -> str:
    """How sentences name a sample."""
    return shown(f"sample '{sample['__key__']}' of shard {sample['__url__']}")
