"""What a run left of its last evaluation: predictions with pictures, and how well each class is recognised."""

import base64
import binascii
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastvit_engine.errors import UserError
from fastvit_engine.observe.run_folder import RunFolder

_PNG = re.compile(r"data:image/png;base64,([A-Za-z0-9+/]+={0,2})")


@dataclass(frozen=True)
class Sample:
    """An evaluation image and what the model predicted."""

    key: str
    label: int
    image: str  # data URL of a PNG
    width: int  # pixels
    predictions: list[tuple[int, float]]  # class index and probability, the most probable first

    @property
    def correct(self) -> bool:
        return bool(self.predictions) and self.predictions[0][0] == self.label


@dataclass(frozen=True)
class Samples:
    """Images of the evaluation set, and what the model says of them."""

    step: int
    class_names: list[str] | None
    samples: list[Sample]

    def class_name(self, index: int) -> str:
        return _name(index, self.class_names)


class Picture(NamedTuple):
    """An evaluation image as a masked autoencoder sees it, as it completes it, and as it is, side by side."""

    key: str
    image: str  # data URL of a PNG
    width: int  # pixels


@dataclass(frozen=True)
class Reconstructions:
    """What a masked autoencoder makes of some images of the evaluation set."""

    step: int
    averaged: bool  # by the moving average of the weights
    pictures: list[Picture]


class ClassRow(NamedTuple):
    """How a class is recognised."""

    name: str
    images: int
    right: int

    @property
    def accuracy(self) -> float:
        return self.right / self.images

    @property
    def perfect(self) -> bool:
        return self.right == self.images


class Mistake(NamedTuple):
    """A pair of classes that is confused."""

    truth: str
    answer: str
    times: int
    share: float | None  # of the images of the right class; None if that is unknown


@dataclass(frozen=True)
class Classes:
    """How well each class is recognised."""

    step: int
    averaged: bool  # by the moving average of the weights
    rows: list[ClassRow]  # the weakest first
    mistakes: list[Mistake]  # the most frequent first


def read_samples(folder: RunFolder) -> Samples:
    """The content of `samples.json`. Raises UserError if it is damaged."""
    named = folder.describe(folder.samples)
    content = read_json(folder.samples, named)
    try:
        return Samples(
            step=int(content["step"]),
            class_names=_class_names(content),
            samples=[
                Sample(
                    key=str(sample["key"]),
                    label=int(sample["label"]),
                    image=sample["image"],
                    width=_png_width(sample["image"]),
                    predictions=[(int(index), float(probability)) for index, probability in sample["predictions"]],
                )
                for sample in content["samples"]
            ],
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"does not hold sample predictions ({error!r})"
        raise UserError(f"{named} {problem}: remove it, or evaluate again") from error


def read_reconstructions(folder: RunFolder) -> Reconstructions:
    """The content of `reconstructions.json`. Raises UserError if it is damaged."""
    named = folder.describe(folder.reconstructions)
    content = read_json(folder.reconstructions, named)
    try:
        return Reconstructions(
            step=int(content["step"]),
            averaged=content["eval"] == "eval_ema",
            pictures=[
                Picture(str(picture["key"]), picture["image"], _png_width(picture["image"]))
                for picture in content["pictures"]
            ],
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"does not hold pictures ({error!r})"
        raise UserError(f"{named} {problem}: remove it, or evaluate again") from error


def read_classes(folder: RunFolder) -> Classes:
    """The content of `classes.json`. Raises UserError if it is damaged."""
    named = folder.describe(folder.classes)
    content = read_json(folder.classes, named)
    try:
        names = _class_names(content)
        found = (map(_count, row) for row in content["classes"])
        counts = {number: (images, right) for number, images, right in found}
        if any(not 0 <= right <= images or images == 0 for images, right in counts.values()):
            raise ValueError("more images are right than there are")
        rows = [ClassRow(_name(number, names), *pair) for number, pair in counts.items()]
        mistakes = [
            Mistake(_name(truth, names), _name(answer, names), times, _share(times, counts.get(truth)))
            for truth, answer, times in (map(_count, row) for row in content["confused"])
        ]
        return Classes(
            step=int(content["step"]),
            averaged=content["eval"] == "eval_ema",
            rows=sorted(rows, key=lambda row: row.accuracy),
            mistakes=mistakes,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"does not hold the figures of classes ({error!r})"
        raise UserError(f"{named} {problem}: remove it, or evaluate again") from error


def read_json(path: Path, named: str) -> Any:
    """The content of a JSON file, called `named`. Raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{named} is not valid JSON: the file is damaged") from error


def _class_names(content: Any) -> list[str] | None:
    return None if content["class_names"] is None else [str(name) for name in content["class_names"]]


def _name(index: int, names: Sequence[str] | None) -> str:
    return names[index] if names and 0 <= index < len(names) else f"class {index}"


def _count(value: Any) -> int:
    """The number of a class, or of images. Raises ValueError if the value is none."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no count")
    return value


def _share(times: int, counts: tuple[int, int] | None) -> float | None:
    return None if counts is None else times / counts[0]


def _png_width(url: str) -> int:
    """Width in pixels of a PNG in a data URL. ValueError for any other URL: a report must not refer to other files."""
    match = _PNG.fullmatch(url)
    if match is None:
        raise ValueError("an image is not a PNG in a data URL")
    try:
        header = base64.b64decode(match[1][:32])  # 8 bytes signature, 4 length, 4 "IHDR", 4 width
    except binascii.Error as error:
        raise ValueError("an image is not valid base64") from error
    if header[:8] != b"\x89PNG\r\n\x1a\n" or header[12:16] != b"IHDR":
        raise ValueError("an image is not a PNG")
    return int.from_bytes(header[16:20], "big")
