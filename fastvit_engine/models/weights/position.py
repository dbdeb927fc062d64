"""Position tables for another grid of patches, and those that other programs have no room for."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_engine.config import ModelConfig
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
    grid = table[:, class_tokens:].unflatten(1, (before, before)).movedim(3, 1)  # [L, D, H, W]
    resampled = _resampled(grid, (side, side), interpolation).movedim(1, 3).flatten(1, 2)
    return torch.cat([table[:, :class_tokens], resampled], dim=1)


def resample_axis(table: Tensor, side: int, interpolation: Interpolation = "bilinear") -> Tensor:
    """A table of columns or of rows [L, S, D/2], see learned_2d, for a grid of side x side patches: [L, side, D/2].

    Whole positions joined of such tables are those that `resample_positions` makes of the joined ones.
    """
    line = table.movedim(2, 1)[..., None]  # [L, D/2, S, 1]
    return table if side == table.shape[1] else _resampled(line, (side, 1), interpolation)[..., 0].movedim(1, 2)


def foreign_positions(config: ModelConfig) -> str | None:
    """The positions that models of other programs lack, by the names of their parameters; None: they have them too."""
    if config.pos_embed == "relative":
        return "relative positions ('blocks.0.attn.rel_pos_embed' and its like)"
    if config.pos_embed == "learned_2d":
        return "a position table of columns and one of rows ('pos_embed_x', 'pos_embed_y')"
    if config.pos_embed_at != "input":
        layers = "each with rows of its own" if config.pos_embed_at == "every_layer" else "the same for all"
        return f"positions that are added in every layer ('pos_embed', {layers})"
    return None


def check_positions(config: ModelConfig, where: str, target: str, *, needs_table: bool = True) -> None:
    """Raises UserError if the positions of the model in `where` have no room in `target`, or are missing there."""
    if (what := foreign_positions(config)) is not None:
        raise UserError(
            f"{where} has {what}, for which {target} has no room: a file of `fastvit export` has, for this program"
        )
    if needs_table and config.pos_embed == "none":
        raise UserError(
            f"{where} has no position table ('pos_embed'), which {target} must have: write --to timm, whose models "
            "may have none"
        )


def _resampled(grid: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    if interpolation == "bilinear":
        return F.interpolate(grid.double(), size, mode="bilinear", align_corners=True).to(grid.dtype)
    return F.interpolate(grid.double(), size, mode="bicubic", align_corners=False).to(grid.dtype)
