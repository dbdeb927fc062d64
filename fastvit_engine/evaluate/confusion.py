"""Which classes a model mistakes for which: a table and a picture."""

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fastvit_engine.evaluate.record import Integers, hits

_NAMED = 30  # classes up to which the picture shows names and shares
_SIDE = 960  # pixels of the matrix, about
_PAPER, _INK, _FULL = (255, 255, 255), (27, 29, 33), (20, 66, 140)
_MARGIN, _TEXT = 24, 15


class ClassRow(NamedTuple):
    """How a model does on one class."""

    number: int  # of the output
    name: str
    samples: int
    top1: float  # share of its images that are right, 0 to 1
    top5: float  # share of its images with the class among the first five answers
    taken_for: str  # the wrong class that its images are taken for most; "" if none is
    times: int  # how often


class Confusion:
    """How often each class was taken for each, over the images that count.

    right: [N, G] right outputs of each image, filled up with -1; all -1: the image does not count. ranked: [N, up to 5]
    outputs by score.
    """

    def __init__(self, right: Integers, ranked: Integers) -> None:
        counted = (right >= 0).any(axis=1)
        right, ranked = right[counted], ranked[counted]
        found = hits(ranked, right)
        first = right[np.arange(len(right)), (right >= 0).argmax(axis=1)]
        self.truth = np.where(found[:, 0], ranked[:, 0], first)  # of several right classes, the one that was said
        self.said = ranked[:, 0]
        self.in_top5: NDArray[np.bool_] = np.any(found, axis=1)
        self.classes = np.unique(np.concatenate([self.truth, self.said]))  # numbers of outputs, that occur

    def matrix(self) -> NDArray[np.int64]:
        """[C, C] images of each class (rows) that were taken for each (columns), of `classes`."""
        size = len(self.classes)
        rows, columns = (np.searchsorted(self.classes, numbers) for numbers in (self.truth, self.said))
        return np.bincount(rows * size + columns, minlength=size * size).reshape(size, size)

    def pairs(self) -> list[tuple[int, int, int]]:
        """(right class, wrong answer, times) of all mistakes, the most frequent first; of equals, in their order."""
        wrong = np.stack([self.truth, self.said], axis=1)[self.truth != self.said]
        pairs, times = np.unique(wrong, axis=0, return_counts=True)
        order = np.argsort(-times, kind="stable")
        return [
            (truth, said, count)
            for (truth, said), count in zip(pairs[order].tolist(), times[order].tolist(), strict=True)
        ]

    def table(self, names: Sequence[str] | None) -> list[ClassRow]:
        """A row per class that has images."""
        numbers, own, samples = np.unique(self.truth, return_inverse=True, return_counts=True)
        right = np.bincount(own, weights=self.truth == self.said)
        in_top5 = np.bincount(own, weights=self.in_top5)
        most: dict[int, tuple[int, int]] = {}  # of each class, the first pair is its most frequent mistake
        for truth, said, times in self.pairs():
            most.setdefault(truth, (said, times))
        rows = []
        for place, number in enumerate(numbers.tolist()):
            taken_for, times = most.get(number, (None, 0))
            rows.append(
                ClassRow(
                    number=number,
                    name=name_of(number, names),
                    samples=int(samples[place]),
                    top1=float(right[place] / samples[place]),
                    top5=float(in_top5[place] / samples[place]),
                    taken_for="" if taken_for is None else name_of(taken_for, names),
                    times=times,
                )
            )
        return rows

    def csv(self, names: Sequence[str] | None) -> str:
        """The table as text."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("class", *ClassRow._fields[1:]))
        writer.writerows(self.table(names))
        return text.getvalue()

    def picture(self, names: Sequence[str] | None) -> Image.Image:
        """The matrix, each row in shares of its class: darker is more. Up to 30 classes have names and figures."""
        matrix = self.matrix()
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        size = len(shares)
        if size > _NAMED:
            return _framed(_cells(_pooled(shares, _SIDE)))
        cell = max(44, min(72, _SIDE // size))
        labels = [name_of(int(number), names) for number in self.classes]
        font = ImageFont.load_default(_TEXT)
        labels = [label if len(label) <= 18 else f"{label[:17]}…" for label in labels]
        left = int(max(font.getlength(label) for label in labels)) + 12
        sheet = Image.new("RGB", (2 * _MARGIN + left + size * cell, 2 * _MARGIN + left + size * cell), _PAPER)
        sheet.paste(
            _cells(shares).resize((size * cell, size * cell), Image.Resampling.NEAREST), (_MARGIN + left, _MARGIN)
        )
        draw = ImageDraw.Draw(sheet)
        for row in range(size):
            middle = _MARGIN + row * cell + cell // 2
            draw.text((_MARGIN + left - 8, middle), labels[row], fill=_INK, font=font, anchor="rm")
            for column in np.flatnonzero(shares[row]).tolist():
                share = shares[row, column]
                centre = (_MARGIN + left + column * cell + cell // 2, middle)
                draw.text(centre, f"{100 * share:.0f}", fill=_PAPER if share > 0.5 else _INK, font=font, anchor="mm")
        for column in range(size):
            word = Image.new("RGB", (left - 8, _TEXT + 8), _PAPER)
            ImageDraw.Draw(word).text((left - 10, 4), labels[column], fill=_INK, font=font, anchor="ra")
            corner = (_MARGIN + left + column * cell + (cell - word.height) // 2, _MARGIN + size * cell + 8)
            sheet.paste(word.rotate(90, expand=True), corner)
        return sheet


def name_of(number: int, names: Sequence[str] | None) -> str:
    """What an output is called."""
    return names[number] if names is not None and number < len(names) else f"class {number}"


def _pooled(shares: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    """At most `most` rows and columns: each the largest of the neighbours that it stands for, so that none is lost."""
    if len(shares) <= most:
        return shares
    starts = np.arange(most) * len(shares) // most
    return np.maximum.reduceat(np.maximum.reduceat(shares, starts, axis=0), starts, axis=1)


def _cells(shares: NDArray[np.float64]) -> Image.Image:
    """A pixel per cell, from paper to full colour; a square root, so that rare mistakes can be seen."""
    paper, full = np.array(_PAPER, float), np.array(_FULL, float)
    return Image.fromarray((paper + (full - paper) * np.sqrt(shares)[:, :, None]).astype(np.uint8))


def _framed(cells: Image.Image) -> Image.Image:
    factor = max(1, _SIDE // cells.width)
    cells = cells.resize((cells.width * factor, cells.height * factor), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (cells.width + 2 * _MARGIN, cells.height + 2 * _MARGIN), _PAPER)
    ImageDraw.Draw(sheet).rectangle(
        (_MARGIN - 1, _MARGIN - 1, _MARGIN + cells.width, _MARGIN + cells.height), outline=(200, 200, 200)
    )
    sheet.paste(cells, (_MARGIN, _MARGIN))
    return sheet
