"""`fastvit data stats`: what a set of shards holds."""

import io
import json
import warnings
from collections import Counter as Tally
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fastvit_engine.config import Config
from fastvit_engine.data.build.parallel import Counter, default_workers, ordered_map
from fastvit_engine.data.pixels.decode import decode_image
from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.data.shards.names import Split, shard_set
from fastvit_engine.data.shards.sample import Ignored, describe_ignored
from fastvit_engine.data.shards.soft_labels import SoftLabel
from fastvit_engine.data.shards.usable import PLAUSIBLE_CLASSES, SampleKeys, judge
from fastvit_engine.errors import UserError
from fastvit_engine.observe.progress import WorkProgress
from fastvit_engine.observe.units import counted, format_bytes
from fastvit_engine.shown import recorded, shown

PIXEL_SAMPLE = 5000  # images whose pixels are looked at
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_BAR = 32  # characters
_CLASSES_SHOWN = 8  # of the largest, and of the smallest


@dataclass
class ShardStats:
    """What a set of shards holds."""

    where: str
    shards: int
    class_names: list[str]  # in the order of the labels
    class_counts: np.ndarray  # int64 [classes]; a sample counts once for each of its labels
    formats: dict[str, int]
    width: np.ndarray  # uint32 [N], pixels
    height: np.ndarray
    bytes: np.ndarray  # uint32 [N], of the encoded images
    pixel_images: int  # images that the next two are made of
    mean: np.ndarray  # float64 [3], RGB in 0..1, over all pixels of these images
    std: np.ndarray
    unusable: dict[str, int]  # samples whose image or labels are not in the figures, by what is wrong with them
    ignored: Ignored  # files that belong to no sample
    soft: "SoftStats"

    @property
    def images(self) -> int:
        return len(self.width)

    def quantiles(self) -> dict[str, list[float]]:
        values = {
            "width": self.width,
            "height": self.height,
            "short side": np.minimum(self.width, self.height),
            "width / height": self.width / self.height,
            "kilobytes": self.bytes / 1000,
        }
        return {name: np.quantile(value, QUANTILES).tolist() for name, value in values.items()}

    def to_json(self) -> str:
        content: dict[str, Any] = {
            "shards": self.shards,
            "images": self.images,
            "bytes": int(self.bytes.sum()),
            "formats": self.formats,
            "unusable": self.unusable,
            "ignored": self.ignored.total(),
            "classes": dict(zip(self.class_names, self.class_counts.tolist(), strict=True)),
            "quantiles": {"of": list(QUANTILES), **self.quantiles()},
            "soft_labels": self.soft.to_json(),
            "pixels": {"images": self.pixel_images, "mean": self.mean.tolist(), "std": self.std.tolist()},
        }
        return json.dumps(recorded(content), indent=2)

    def report(self) -> str:
        formats = ", ".join(f"{count:,} {shown(name)}" for name, count in sorted(self.formats.items()))
        total = int(self.bytes.sum())
        lines = [
            f"{shown(self.where)}: {counted(self.images, 'image')} ({formats}) in {counted(self.shards, 'shard')}, "
            f"{format_bytes(total)}, "
            f"{format_bytes(total / self.images)} per image{describe_ignored(self.ignored)}",
            *(
                f"left out: {count:,} of kind '{kind}' (fastvit data verify names them)"
                for kind, count in sorted(self.unusable.items())
            ),
            "",
            " " * 16
            + "".join(f"{name:>10}" for name in ("smallest", "5 %", "25 %", "median", "75 %", "95 %", "largest")),
        ]
        for name, values in self.quantiles().items():
            style = ".2f" if name == "width / height" else ".1f" if name == "kilobytes" else ",.0f"
            lines.append(f"{name:<16}" + "".join(f"{value:>10{style}}" for value in values))
        lines += ["", f"{'pixels':<16}" + "".join(f"{name:>10}" for name in ("red", "green", "blue"))]
        for name, channels in (("mean", self.mean), ("deviation", self.std)):
            lines.append(f"{name:<16}" + "".join(f"{value:>10.4f}" for value in channels))
        lines.append(f"in 0..1, over all pixels of {self.pixel_images:,} evenly spaced images")
        return "\n".join([*lines, "", *self._histogram(), *self.soft.report()])

    def _histogram(self) -> list[str]:
        counts = self.class_counts
        if not len(counts):
            return ["no labels"]
        low, middle, high = int(counts.min()), float(np.median(counts)), int(counts.max())
        lines = [f"{counted(len(counts), 'class', 'classes')} of {low:,} to {high:,} images, median {middle:,.0f}"]
        order = np.argsort(-counts, kind="stable").tolist()
        listed, left_out = order, 0
        if len(order) > 2 * _CLASSES_SHOWN + 1:
            listed, left_out = order[:_CLASSES_SHOWN] + order[-_CLASSES_SHOWN:], len(order) - 2 * _CLASSES_SHOWN
        names = {label: _short(shown(self.class_names[label]), 28) for label in listed}
        width, digits = max(map(len, names.values())), len(f"{high:,}")
        for number, label in enumerate(listed):
            if left_out and number == _CLASSES_SHOWN:
                lines.append(f"  ... {left_out:,} classes between ...")
            filled = round(_BAR * counts[label] / high) if high else 0
            bar = "█" * filled if filled or not counts[label] else "▏"
            lines.append(f"  {names[label]:<{width}}  {counts[label]:>{digits},}  {bar}".rstrip())
        return lines


@dataclass
class SoftStats:
    """What the soft labels of some samples amount to."""

    count: int = 0  # samples that have one
    best: float = 0.0  # sum over them: the probability of the most probable class
    held: float = 0.0  # and of all classes that are listed
    least_held: float = 1.0

    def add(self, label: SoftLabel) -> None:
        self += SoftStats(1, float(label.probabilities.max()), label.held, label.held)

    def __iadd__(self, other: "SoftStats") -> "SoftStats":
        self.count, self.best, self.held = self.count + other.count, self.best + other.best, self.held + other.held
        self.least_held = min(self.least_held, other.least_held)
        return self

    def to_json(self) -> dict[str, float] | None:
        """The number of samples, and means over them; None without any."""
        if not self.count:
            return None
        means = {"best": self.best / self.count, "held": self.held / self.count}
        return {"samples": self.count, **means, "least_held": self.least_held}

    def report(self) -> list[str]:
        """A line, or none."""
        if not self.count:
            return []
        best, held = (100 * total / self.count for total in (self.best, self.held))
        return [
            "",
            f"{self.count:,} with soft labels: on average the most probable class has {best:.1f} %, and the listed "
            f"ones {held:.4g} % together, at least {100 * self.least_held:.4g} %",
        ]


@dataclass
class Part:
    """What one shard adds."""

    labels: Tally[int] = field(default_factory=Tally)
    formats: Tally[str] = field(default_factory=Tally)
    sizes: list[tuple[int, int, int]] = field(default_factory=list)  # width, height, bytes
    pixels: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), np.int64))  # histograms of R, G, B
    pixel_images: int = 0
    unusable: Tally[str] = field(default_factory=Tally)
    ignored: Ignored = field(default_factory=Ignored)
    soft: SoftStats = field(default_factory=SoftStats)


def shard_stats(
    argument: str, config: Config | None = None, *, split: Split | None = None, workers: int | None = None
) -> ShardStats:
    """Reads every sample of the shards that `argument` names, in parallel, with the keys of `config` (or the defaults).

    Every image is decoded as training does; those whose pixels count are about `PIXEL_SAMPLE`, evenly spaced over all
    shards. Images and labels that are not usable are counted and left out. Needs 12 bytes of memory per image. Raises
    UserError for a shard that is damaged or cannot be read, and if no image is usable.
    """
    data = (config or Config()).data
    keys = SampleKeys.of(data)
    shards = shard_set(argument, split)
    num_classes = len(shards.class_names) if shards.class_names is not None else PLAUSIBLE_CLASSES
    quota = max(1, -(-PIXEL_SAMPLE // len(shards.shards)))
    line, done = WorkProgress(), Counter()
    line.start("reading", len(shards.shards), "shards")

    def look(shard: str) -> Part:
        part = summarize_shard(shard, keys, num_classes, quota)
        done.add()
        return part

    labels: Tally[int] = Tally()
    formats: Tally[str] = Tally()
    sizes: list[np.ndarray] = []
    pixels, pixel_images = np.zeros((3, 256), np.int64), 0
    unusable, ignored, soft = Tally[str](), Ignored(), SoftStats()
    results = ordered_map(
        look,
        shards.shards,
        workers=default_workers() if workers is None else workers,
        while_waiting=lambda: line.update(done.value),
    )
    for part in results:
        labels += part.labels
        formats += part.formats
        sizes.append(np.array(part.sizes, np.uint32).reshape(-1, 3))
        pixels += part.pixels
        pixel_images += part.pixel_images
        unusable += part.unusable
        ignored += part.ignored
        soft += part.soft
    line.clear()
    size = np.concatenate(sizes)  # [N, 3]
    if not len(size):
        if unusable:
            kinds = ", ".join(f"{count:,} of kind '{kind}'" for kind, count in sorted(unusable.items()))
            raise UserError(
                f"the shards of {argument} hold no usable image ({kinds}): set data.image_key, which is "
                f"{data.image_key!r}, to the extension that they have, or see what `fastvit data verify` says"
            )
        raise UserError(f"the shards of {argument} hold no samples: make them again")
    names = dict(enumerate(shards.class_names or []))  # without names, only classes that occur are known
    names |= {label: f"class {label}" for label in sorted(labels) if label not in names}
    mean, std = moments(pixels)
    return ShardStats(
        where=argument,
        shards=len(shards.shards),
        class_names=list(names.values()),
        class_counts=np.array([labels[label] for label in names], np.int64),
        formats=dict(formats),
        width=size[:, 0],
        height=size[:, 1],
        bytes=size[:, 2],
        pixel_images=pixel_images,
        mean=mean,
        std=std,
        unusable=dict(unusable),
        ignored=ignored,
        soft=soft,
    )


def moments(histograms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float64 [C] in 0..1, of the values that int64 [C, 256] counts."""
    values = np.arange(256) / 255
    count = histograms.sum(axis=1)
    mean = histograms @ values / count
    variance = (histograms * (values - mean[:, None]) ** 2).sum(axis=1) / count
    return mean, np.sqrt(variance)


class _Looked(NamedTuple):
    width: int
    height: int
    bytes: int
    format: str
    pixels: np.ndarray | None  # int32 [3, 256]: histograms


def summarize_shard(shard: str, keys: SampleKeys, num_classes: int, quota: int) -> Part:
    """Reads one shard, and the pixels of `quota` to 2 * `quota` of its images."""
    warnings.simplefilter("ignore")  # Pillow's, about odd but readable images
    part = Part()
    kept: list[tuple[int, np.ndarray]] = []  # (row, histograms) of evenly spaced images
    stride = 1
    for row, sample in enumerate(read_shard(shard, part.ignored)):
        judged = judge(sample, keys, num_classes, partial(_look, keys.max_pixels, row % stride == 0))
        part.unusable.update(problem.kind for problem in judged.problems)
        part.labels.update(judged.labels or ())
        if judged.soft is not None:
            part.soft.add(judged.soft)
        if (image := judged.image) is None:
            continue
        part.sizes.append((image.width, image.height, image.bytes))
        part.formats[image.format] += 1
        if image.pixels is not None:
            kept.append((row, image.pixels))
        if len(kept) > 2 * quota:  # the shard turns out longer: take every other one from here on
            stride *= 2
            kept = [entry for entry in kept if entry[0] % stride == 0]
    part.pixel_images = len(kept)
    for _, histograms in kept:
        part.pixels += histograms
    return part


def _look(max_pixels: int, with_pixels: bool, data: bytes) -> _Looked:
    pixels = decode_image(data, max_pixels)  # of every image: a header does not tell whether it is usable
    try:
        with Image.open(io.BytesIO(data)) as image:
            name = str(image.format)
    except OSError:
        name = "unknown format"
    return _Looked(pixels.shape[1], pixels.shape[0], len(data), name, _histograms(pixels) if with_pixels else None)


def _histograms(pixels: np.ndarray) -> np.ndarray:
    """int32 [3, 256] of uint8 [H, W, 3]."""
    return np.stack([np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(3)]).astype(np.int32)


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"
