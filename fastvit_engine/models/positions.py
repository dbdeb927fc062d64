"""Position embeddings: the tables that a model has for them, and what it adds to its tokens."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_engine.config import ModelConfig
from fastvit_engine.config.model_shape import Shape

TABLES = ("pos_embed", "pos_embed_x", "pos_embed_y")  # parameters of the model, of which it has some or none
_TEMPERATURE = 10_000.0


def table_shapes(config: ModelConfig, shape: Shape) -> dict[str, tuple[int, int, int]]:
    """The position tables of a model as its own parameters, by name: L tables of N rows, L being depth or 1."""
    layers = shape.depth if config.pos_embed_at == "every_layer" else 1
    if config.pos_embed in ("learned", "sincos_2d"):
        return {"pos_embed": (layers, shape.positions, shape.width)}
    if config.pos_embed == "learned_2d":
        one = (layers, grid_side(shape), shape.width // 2)
        return {"pos_embed_x": one, "pos_embed_y": one}
    return {}


def relative_tokens(config: ModelConfig, shape: Shape) -> int | None:
    """How many tokens the blocks know distances of; None if their attention has no positions."""
    return shape.tokens if config.pos_embed == "relative" else None


def grid_side(shape: Shape) -> int:
    """Rows, and columns, of the patches of an image."""
    return round(shape.patches**0.5)


def joined(columns: Tensor, rows: Tensor) -> Tensor:
    """Tables [L, W, D/2] and [L, H, D/2] of learned_2d -> [L, H * W, D]: patch by patch, that of its column first."""
    height, width = rows.shape[1], columns.shape[1]
    x = columns[:, None].expand(-1, height, -1, -1)
    y = rows[:, :, None].expand(-1, -1, width, -1)
    return torch.cat([x, y], dim=3).flatten(1, 2)


class AddedPositions(NamedTuple):
    """What a model adds to its tokens."""

    at_input: Tensor | None  # [1, N, D] for the patch embedding, with a row for the class token if there is one
    later: list[Tensor]  # for the input of each block after the first [1 or B, N, D]; []: nothing


def added_positions(
    tables: Tensor | None, config: ModelConfig, shape: Shape, keep_indices: Tensor | None = None
) -> AddedPositions:
    """Tables [L, N, D] by layer, with zeros for tokens without a position.

    tables: rows of the first tokens, if they have one, and then those of all patches; None: there are no positions.
    keep_indices: int64 [B, K], the patches that the blocks see; None: all.
    """
    if tables is None:
        return AddedPositions(None, [])
    if not torch.is_grad_enabled():  # where views of parameters claim a gradient, which hooks of PyTorch look for
        tables = tables.detach()
    own = shape.positions - shape.patches  # rows that are not of patches
    first, *others = tables.split(1)
    shared = config.pos_embed_at == "shared"
    later = [_padded(_kept(table, own, keep_indices), shape.prefix - own) for table in ([first] if shared else others)]
    return AddedPositions(_padded(first, (config.pool == "cls") - own), later * (shape.depth - 1) if shared else later)


def _padded(table: Tensor, rows: int) -> Tensor:
    """With as many rows of zeros before the others."""
    return F.pad(table, (0, 0, rows, 0)) if rows else table


def _kept(table: Tensor, own: int, keep_indices: Tensor | None) -> Tensor:
    """[1, own + N, D] -> [B, own + K, D], the rows of the patches at these indices [B, K] of each image."""
    if keep_indices is None:
        return table
    patches = table[:, own:].take_along_dim(keep_indices[:, :, None], dim=1)
    return torch.cat([table[:, :own].expand(len(patches), -1, -1), patches], dim=1)


def resampled(tables: Tensor, shape: Shape, side: int) -> Tensor:
    """Tables [L, N, D] of the model's grid for a grid of side x side patches, bicubically, as DINO's authors do.

    Edges are aligned, without antialiasing; rows of other tokens are kept. The weights of the four neighbours along
    either axis are a matrix, so that the gradient is a product too, and the same in every run on any device.
    """
    own, whole = shape.positions - shape.patches, grid_side(shape)
    if side == whole:
        return tables
    unit = torch.eye(whole, device=tables.device)[None, None]
    weights = F.interpolate(unit, (side, whole), mode="bicubic", align_corners=False)[0, 0]  # [side, whole]
    grid = tables[:, own:].float().unflatten(1, (whole, whole))  # [L, h, w, D]
    grid = torch.einsum("yh,xw,lhwd->lyxd", weights, weights, grid).to(tables.dtype)
    return torch.cat([tables[:, :own], grid.flatten(1, 2)], dim=1)


def init_learned(table: Tensor) -> None:
    """As the authors' code sets the table of the input; it has no other."""
    nn.init.normal_(table, std=0.02)


def sincos_positions(shape: Shape) -> Tensor:
    """Sines and cosines of the column and row of each patch, float32 [1, positions, D]; zeros for other tokens.

    As big_vision computes them, after MoCo v3 (Chen et al. 2021, arXiv:2104.02057): a quarter of the width each for
    sines and cosines of x and of y, with D / 4 frequencies from 1 to 1 / 10,000 in equal ratios. Positions count in
    patches, so another image size keeps the frequencies.
    """
    side = grid_side(shape)
    line = sincos_line(side, shape.width)
    table = np.zeros((1, shape.positions, shape.width))
    rows, columns = np.repeat(line, side, axis=0), np.tile(line, (side, 1))
    table[:, shape.positions - shape.patches :] = np.concatenate([columns, rows], axis=1)
    return torch.from_numpy(table).float()


def sincos_line(count: int, width: int) -> np.ndarray:
    """The half of `sincos_positions` that is of columns, or of rows, 0 to count - 1: float64 [count, width / 2]."""
    angles = np.arange(count)[:, None] * _TEMPERATURE ** -np.linspace(0, 1, width // 4)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
