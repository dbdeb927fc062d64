"""What self-supervised objectives predict of an image's patches: computed from the pixels alone."""

from typing import Literal

import torch
from torch import Tensor

from fastvit_engine.config.model_shape import GRID_CELLS

_EPS = 1e-6
_LEVELS = 8  # of a colour channel: three bits


def mae_targets(images: Tensor, patch_size: int) -> Tensor:
    """The pixels of each patch, normalised by their own mean and standard deviation (He et al. 2022, section 4.2).

    images: floating [B, 3, H, W]. Returns [B, N, P * P * 3] in their dtype: patches row by row, and in each its pixels
    row by row with the colour channel last. The variance is the unbiased one, plus 1e-6. Raises ValueError for another
    shape, TypeError for integers.
    """
    pixels = patch_pixels(images, patch_size)
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return (pixels - mean) / (variance + _EPS).sqrt()


def patch_pixels(images: Tensor, patch_size: int) -> Tensor:
    """As `mae_targets`, without its normalisation: floating [B, 3, H, W] -> [B, N, P * P * 3]."""
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, got {images.dtype}: normalise them first")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape [B, 3, H, W], got {list(images.shape)}")
    _check_size(images.shape[2], images.shape[3], patch_size)
    return _cut(images.permute(0, 2, 3, 1), patch_size).flatten(2)


def join_patches(patches: Tensor, patch_size: int) -> Tensor:
    """[B, N, P * P * 3] of square images, as `patch_pixels` cuts them, -> [B, H, W, 3]."""
    side = round(patches.shape[1] ** 0.5)
    grid = patches.unflatten(2, (patch_size, patch_size, 3)).unflatten(1, (side, side))  # [B, h, w, P, P, 3]
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def masked_patch_targets(images: Tensor, patch_size: int, kind: Literal["mean", "grid"] = "mean") -> Tensor:
    """The mean colour of each patch in three bits a channel (Dosovitskiy et al. 2021, appendix B.1.2).

    images: uint8 [B, H, W, 3]. Returns int64 in [0, 512), 64 r + 8 g + b: [B, N] for kind "mean"; for "grid", [B, N,
    16], the same of the 4 x 4 cells of each patch, row by row. A level is floor(8 sum / (256 P^2)), in integers, so
    that every machine gets the same. Raises ValueError for another shape or size, TypeError for another dtype.
    """
    if kind not in ("mean", "grid"):
        raise ValueError(f"kind must be mean or grid, got {kind!r}")
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must have shape [B, H, W, 3], got {list(images.shape)}")
    _check_size(images.shape[1], images.shape[2], patch_size)
    if kind == "mean":
        return _colours(_cut(images, patch_size))
    if patch_size % GRID_CELLS:
        raise ValueError(f"a patch of {patch_size} pixels has no grid of {GRID_CELLS} x {GRID_CELLS} cells")
    patches = _cut(images, patch_size)  # [B, N, P, P, 3]
    cells = _cut(patches.flatten(0, 1), patch_size // GRID_CELLS)
    return _colours(cells).unflatten(0, patches.shape[:2])


def _check_size(height: int, width: int, patch_size: int) -> None:
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"images of {height} x {width} pixels cannot be cut into patches of {patch_size} pixels")


def _cut(images: Tensor, side: int) -> Tensor:
    """[B, H, W, 3] -> [B, N, side, side, 3], row by row."""
    grid = images.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # [B, h, side, w, side, 3]
    return grid.transpose(2, 3).flatten(1, 2)


def _colours(squares: Tensor) -> Tensor:
    """uint8 [B, N, side, side, 3] -> int64 [B, N]."""
    pixels = squares.shape[2] * squares.shape[3]
    levels = _LEVELS * squares.sum(dim=(2, 3), dtype=torch.int64) // (256 * pixels)  # [B, N, 3]
    red, green, blue = levels.unbind(-1)
    return (_LEVELS * red + green) * _LEVELS + blue
