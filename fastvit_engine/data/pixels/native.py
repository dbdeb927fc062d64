"""Crops at their own proportions: how many patches they have, and how evaluation sees images then (section packing)."""

import math
from typing import NamedTuple

import numpy as np

from fastvit_engine.config import Config, EvalTransform
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.data.pixels.crops import Grid, View
from fastvit_engine.data.pixels.draws import uniforms
from fastvit_engine.packed_image import packed_bytes

_STREAM = 2001  # of `uniforms`


class Patches(NamedTuple):
    """How many patches an image is resized to."""

    size: int  # pixels of the side of one
    least: int
    most: int

    @classmethod
    def of(cls, config: Config) -> "Patches | None":
        """Those of section packing; None: images are squares."""
        packing = config.packing
        if packing.max_patches is None:
            return None
        least = packing.max_patches if packing.min_patches is None else packing.min_patches
        return cls(resolve_shape(config.model).patch_size, least, packing.max_patches)

    @property
    def bytes(self) -> int:
        """Of an image in a batch, see `packed_image`."""
        return packed_bytes(self.most, self.size)

    def draw(self, seeds: np.ndarray) -> list[float]:
        """A number in [0, 1) for each sample of a batch, from its seed (int64 [B]), for `count`."""
        return uniforms(seeds, 1, stream=_STREAM)[:, 0].tolist()

    def count(self, drawn: float) -> int:
        """Uniform between the least and the most."""
        return self.least + int(drawn * (self.most - self.least + 1))

    def fit(self, view: View, count: int) -> View:
        """The box of a view resized to at most `count` patches, instead of to a square."""
        grid = fitting_grid(view.height, view.width, count, self.size)
        return view._replace(resized=grid.pixels, grid=grid)


def fitting_grid(height: int, width: int, most: int, patch_size: int) -> Grid:
    """The rows and columns of at most `most` patches with about the proportions of an image, rounded down.

    Of a square number of patches, a square image gets all. Images too long for that have one row or column. Integers,
    so that every machine gets the same.
    """
    rows = min(max(1, math.isqrt(most * height // width)), most)
    columns = min(max(1, math.isqrt(most * width // height)), most // rows)
    return Grid(rows, columns, patch_size)


def native_eval_view(height: int, width: int, patches: Patches, eval_crop: float, transform: EvalTransform) -> View:
    """As `eval_view`, at the image's proportions: the whole image, to be cut to the centre, eval_crop of each side.

    A square image is resized and cut as `eval_view` does for a square of as many patches.
    """
    grid = fitting_grid(height, width, patches.most, patches.size)
    sides = grid.pixels
    if transform == "fast":
        resized = tuple(max(side, round(side / eval_crop)) for side in sides)
        return View(0, 0, height, width, (resized[0], resized[1]), grid=grid)
    resized = tuple(math.floor(side / eval_crop) for side in sides)
    view = View(0, 0, height, width, (resized[0], resized[1]), grid=grid)
    if transform == "big_vision":
        return view._replace(decoding="tensorflow", resampling="tensorflow_area")
    corner = round((resized[0] - sides[0]) / 2), round((resized[1] - sides[1]) / 2)  # halves to even
    return view._replace(resampling="pillow_bicubic", corner=corner)
