"""`fastvit data stats`: what a set of shards holds."""

import io
import json
import warnings
from collections import Counter as Tally
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from fastvit_engine.config import DataConfig
from fastvit_engine.data.build.parallel import Counter, default_workers, ordered_map
from fastvit_engine.data.pixels.decode import decode_image
from fastvit_engine.data.shards.labels import labels_of
from fastvit_engine.data.shards.names import Split, shard_set
from fastvit_engine.data.stream.sequential import read_shard
from fastvit_engine.errors import UserError
from fastvit_engine.observe.progress import WorkProgress
from fastvit_engine.observe.units import format_bytes

PIXEL_SAMPLE = 5000  # images whose pixels are looked at
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_BAR = 32  # characters
_CLASSES_SHOWN = 8  # of the largest, and of the smallest


@dataclass
class ShardStats:
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
            "classes": dict(zip(self.class_names, self.class_counts.tolist(), strict=True)),
            "quantiles": {"of": list(QUANTILES), **self.quantiles()},
            "pixels": {"images": self.pixel_images, "mean": self.mean.tolist(), "std": self.std.tolist()},
        }
        return json.dumps(content, indent=2)

    def report(self) -> str:
        formats = ", ".join(f"{count:,} {name}" for name, count in sorted(self.formats.items()))
        total = int(self.bytes.sum())
        lines = [
            f"{self.where}: {self.images:,} images ({formats}) in {self.shards:,} shards, {format_bytes(total)}, "
            f"{format_bytes(total / self.images)} an image",
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
        return "\n".join([*lines, "", *self._histogram()])

    def _histogram(self) -> list[str]:
        counts = self.class_counts
        if not len(counts):
            return ["no labels"]
        low, middle, high = int(counts.min()), float(np.median(counts)), int(counts.max())
        lines = [f"{len(counts):,} classes of {low:,} to {high:,} images, median {middle:,.0f}"]
        order = np.argsort(-counts, kind="stable").tolist()
        shown, left_out = order, 0
        if len(order) > 2 * _CLASSES_SHOWN + 1:
            shown, left_out = order[:_CLASSES_SHOWN] + order[-_CLASSES_SHOWN:], len(order) - 2 * _CLASSES_SHOWN
        names = {label: _short(self.class_names[label], 28) for label in shown}
        width, digits = max(map(len, names.values())), len(f"{high:,}")
        for place, label in enumerate(shown):
            if left_out and place == _CLASSES_SHOWN:
                lines.append(f"  ... {left_out:,} classes between ...")
            filled = round(_BAR * counts[label] / high) if high else 0
            bar = "█" * filled if filled or not counts[label] else "▏"
            lines.append(f"  {names[label]:<{width}}  {counts[label]:>{digits},}  {bar}".rstrip())
        return lines


@dataclass
class _Part:
    """What one shard adds."""

    labels: Tally[int] = field(default_factory=Tally)
    formats: Tally[str] = field(default_factory=Tally)
    sizes: list[tuple[int, int, int]] = field(default_factory=list)  # width, height, bytes
    pixels: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), np.int64))  # histograms of R, G, B
    pixel_images: int = 0


def shard_stats(argument: str, *, split: Split | None = None, workers: int | None = None) -> ShardStats:
    """Reads every sample of the shards that `argument` names, in parallel; needs 12 bytes of memory an image.

    Sizes come from the images' headers; the pixels of about `PIXEL_SAMPLE` images, evenly spaced over all shards, are
    decoded. UserError naming shard and key where a sample has no image or no whole one.
    """
    shards = shard_set(argument, split)
    quota = max(1, -(-PIXEL_SAMPLE // len(shards.shards)))
    line, done = WorkProgress(), Counter()
    line.start("reading", len(shards.shards), "shards")

    def look_at(shard: str) -> _Part:
        part = _look_at(shard, quota)
        done.add()
        return part

    labels: Tally[int] = Tally()
    formats: Tally[str] = Tally()
    sizes: list[np.ndarray] = []
    pixels, pixel_images = np.zeros((3, 256), np.int64), 0
    results = ordered_map(
        look_at,
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
    line.clear()
    size = np.concatenate(sizes)  # [N, 3]
    if not len(size):
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
    )


def moments(histograms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float64 [C] in 0..1, of the values that int64 [C, 256] counts."""
    values = np.arange(256) / 255
    count = histograms.sum(axis=1)
    mean = histograms @ values / count
    variance = (histograms * (values - mean[:, None]) ** 2).sum(axis=1) / count
    return mean, np.sqrt(variance)


def _look_at(shard: str, quota: int) -> _Part:
    warnings.simplefilter("ignore")  # Pillow's, about odd but readable images
    part = _Part()
    kept: list[tuple[int, np.ndarray]] = []  # (row, histograms) of evenly spaced images
    stride = 1
    for row, sample in enumerate(read_shard(shard)):
        where = f"sample '{sample['__key__']}' of shard {shard}"
        name = next((name for name in DataConfig().image_key.split(";") if name in sample), None)
        if name is None:
            raise UserError(f"{where} has no image: run `fastvit data verify`")
        try:
            with Image.open(io.BytesIO(sample[name])) as image:
                part.sizes.append((*image.size, len(sample[name])))
                part.formats[str(image.format)] += 1
            part.labels.update(labels_of(sample) or [])
            if row % stride == 0:
                kept.append((row, _histograms(decode_image(sample[name]))))
        except (OSError, ValueError) as error:
            raise UserError(f"{where} cannot be read ({error}): run `fastvit data verify`") from error
        if len(kept) > 2 * quota:  # the shard turns out longer: take every other one from here on
            stride *= 2
            kept = [entry for entry in kept if entry[0] % stride == 0]
    part.pixel_images = len(kept)
    for _, histograms in kept:
        part.pixels += histograms
    return part


def _histograms(pixels: np.ndarray) -> np.ndarray:
    """int32 [3, 256] of uint8 [H, W, 3]."""
    return np.stack([np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(3)]).astype(np.int32)


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"
