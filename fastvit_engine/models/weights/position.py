"""Position tables for another grid of patches: resamples what a model has learned at one resolution."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_engine.errors import UserError

Interpolation = Literal["bilinear", "bicubic"]


def grid_side(tokens: int, class_tokens: int, what: str) -> int:
    """Height and width, in patches, of the square grid that a table of `tokens` rows is of.

    Raises UserError if no grid is square. what: the table, for the sentence.
    """
    side = math.isqrt(max(tokens - class_tokens, 0))
    if side == 0 or side**2 + class_tokens != tokens:
        with_class = " and the class token" if class_tokens else ""
        raise UserError(f"{what} has {tokens} positions, which are no square grid of patches{with_class}")
    return side


def resample_positions(
    table: Tensor, side: int, *, class_tokens: int, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """A position table [L, N, D] for a grid of side x side patches: [L, class_tokens + side^2, D].

    The rows of class tokens, which come first, are kept. bilinear: the corners of both grids are aligned, as in the
    authors' JAX code (`scipy.ndimage.zoom` with order 1); bicubic: the edges are, without antialiasing, as DINOv2 and
    transformers have it. Computed in float64, whatever the type of the table.
    """
    before = grid_side(table.shape[1], class_tokens, "the position table")
    if side == before:
        return table
    grid = table[:, class_tokens:].double().unflatten(1, (before, before)).movedim(3, 1)  # [L, D, H, W]
    if interpolation == "bilinear":
        grid = F.interpolate(grid, (side, side), mode="bilinear", align_corners=True)
    else:
        grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    resampled = grid.movedim(1, 3).flatten(1, 2).to(table.dtype)
    return torch.cat([table[:, :class_tokens], resampled], dim=1)
