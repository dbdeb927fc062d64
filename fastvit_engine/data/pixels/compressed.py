"""The form in which a batch holds images that the GPU is to decode: a header, then a JPEG or pixels.

Every image has a row of as many bytes, so that rows can be cut, joined and shared between processes as those of any
other batch. Pixels are those of images that have been decoded already, because a GPU would not or the JPEG is too long.
"""

from typing import NamedTuple

import numpy as np

from fastvit_engine.data.pixels.crops import View
from fastvit_engine.data.pixels.jpeg_part import Box, Part


class Recipe(NamedTuple):
    """What becomes of the JPEG in a row, in its own pixels: a box of it is averaged, resized and perhaps mirrored."""

    size: int  # bytes of the JPEG; 0: there are pixels instead
    top: int
    left: int
    height: int
    width: int
    reduction: int  # squares of so many pixels are averaged first
    mirrored: int

    @property
    def box(self) -> Box:
        return Box(self.top, self.left, self.height, self.width)


HEADER = 4 * len(Recipe._fields)  # bytes: int32


def row_bytes(image_size: int) -> int:
    """Length of the row of an image that the model sees as a square of so many pixels."""
    return HEADER + 3 * image_size**2


def image_size_of(row: int) -> int:
    """The inverse of `row_bytes`."""
    return round(((row - HEADER) / 3) ** 0.5)


def write_compressed(part: Part, view: View, row: np.ndarray) -> bool:
    """Writes a part of a JPEG that has the box of the view to a row. Returns whether there was room."""
    size = len(part.data)
    if size > len(row) - HEADER:
        return False
    row[HEADER : HEADER + size] = np.frombuffer(part.data, np.uint8)
    top, left = view.top - part.box.top, view.left - part.box.left
    _write(row, Recipe(size, top, left, view.height, view.width, view.reduction, view.mirrored))
    return True


def pixels_in(row: np.ndarray, image_size: int) -> np.ndarray:
    """Makes it a row of pixels, and returns them, to be written: uint8 [S, S, 3]."""
    _write(row, Recipe(0, 0, 0, 0, 0, 1, False))
    return row[HEADER:].reshape(image_size, image_size, 3)


def read_recipes(rows: np.ndarray) -> list[Recipe]:
    """What is in each of the rows, uint8 [B, K]; padding, which is zeros, is pixels."""
    headers = np.ascontiguousarray(rows[:, :HEADER]).view(np.int32)
    return [Recipe(*header) for header in headers.tolist()]


def _write(row: np.ndarray, recipe: Recipe) -> None:
    row[:HEADER] = np.array(recipe, np.int32).view(np.uint8)
