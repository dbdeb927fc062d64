"""Images of different sizes in one sequence of tokens (Dehghani et al. 2023, NaViT, arXiv:2307.06304).

Nothing is padded: attention gets the ends of the images, and every other layer works on tokens one by one.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_engine.config import ModelConfig
from fastvit_engine.config.model_shape import Shape
from fastvit_engine.models.positions import grid_side, sincos_line
from fastvit_engine.packed_image import HEADER


class Packing(NamedTuple):
    """Where the tokens of B images are: image after image, of each what comes before its patches, then these by row.

    T counts patches and U all tokens.
    """

    image: Tensor  # int64 [T], of each patch
    number: Tensor  # int64 [T], of each patch in its image
    grid: Tensor  # int64 [4, T], of each patch: its row and column, and how many rows and columns its image has
    order: Tensor  # int64 [U]: of each token, its row in patches and then what comes before them
    cu_seqlens: Tensor  # int32 [B + 1]
    longest: int  # tokens of the largest image
    lengths: Tensor  # int64 [B], patches of each image
    most: int  # rows or columns of patches, the larger number of them

    @classmethod
    def of(cls, grids: np.ndarray, prefix: int, device: torch.device) -> "Packing":
        """grids: int64 [B, 2], rows and columns of patches. prefix: tokens before the patches of each image."""
        lengths = grids.prod(axis=1)
        image = np.repeat(np.arange(len(grids)), lengths)
        starts = np.cumsum(lengths) - lengths
        number = np.arange(len(image)) - starts[image]
        rows, columns = grids[image].T
        grid = np.stack([number // columns, number % columns, rows, columns])
        ends = np.cumsum(lengths + prefix)
        order = np.empty(ends[-1], np.int64)
        order[np.arange(len(image)) + prefix * (image + 1)] = np.arange(len(image))
        before = (ends - lengths - prefix)[:, None] + np.arange(prefix)  # [B, prefix]
        order[before] = len(image) + np.arange(before.size).reshape(before.shape)
        cu_seqlens = np.concatenate([[0], ends]).astype(np.int32)
        return cls(
            image=_on_device(image, device),
            number=_on_device(number, device),
            grid=_on_device(grid, device),
            order=_on_device(order, device),
            cu_seqlens=_on_device(cu_seqlens, device),
            longest=int(lengths.max()) + prefix,
            lengths=_on_device(lengths, device),
            most=int(grids.max()),
        )

    def patches(self, images: Tensor, patch_size: int) -> Tensor:
        """The pixels of the patches, uint8 [T, P, P, 3], of images in the form of `packed_image`, uint8 [B, K]."""
        pixels = images[:, HEADER:].unflatten(1, (-1, 3 * patch_size**2))  # [B, N, 3 P^2]
        return pixels[self.image, self.number].view(-1, patch_size, patch_size, 3)

    def joined(self, patches: Tensor, before: Tensor) -> Tensor:
        """[T, D] of the patches and [prefix, D] of what comes before those of every image -> [1, U, D]."""
        before = before.expand(len(self.lengths), *before.shape).flatten(0, 1)  # [B * prefix, D]
        # No index comes twice, so that the gradient is the same in every run.
        return torch.cat([patches, before]).index_select(0, self.order)[None]

    def first_tokens(self, tokens: Tensor) -> Tensor:
        """The first token of every image, [B, D] of [1, U, D]."""
        return tokens[0].index_select(0, self.cu_seqlens[:-1])

    def means_of_patches(self, tokens: Tensor) -> Tensor:
        """The mean of the patches of every image, [B, D] of [1, U, D]."""
        width = self.longest  # enough
        offsets = torch.arange(width, device=tokens.device)
        slots = (self.cu_seqlens[1:].long() - self.lengths)[:, None] + offsets  # [B, width]
        slots = torch.where(offsets < self.lengths[:, None], slots, tokens.shape[1])  # the last one is a row of zeros
        padded = F.pad(tokens[0], (0, 0, 0, 1)).index_select(0, slots.flatten()).unflatten(0, slots.shape)
        return padded.sum(dim=1) / self.lengths[:, None].to(tokens.dtype)


def packed_positions(
    tables: Tensor | tuple[Tensor, Tensor] | None, config: ModelConfig, shape: Shape, packing: Packing
) -> list[tuple[Tensor, Tensor]]:
    """What the tokens of each layer get: [T, D] for the patches, and [prefix, D] for what comes before them.

    One entry a table; none if there is no position embedding. tables: `pos_embed` [L, N, D], or `pos_embed_x` and
    `pos_embed_y` [L, S, D/2] each, or None. Learned tables are resampled to the grid of each image, bilinearly with
    aligned corners, as they are for another `image_size` (see `resample_positions`); sines and cosines count patches.
    """
    if tables is None:
        return []
    row, column, rows, columns = packing.grid
    some = tables if isinstance(tables, Tensor) else tables[0]
    if config.pos_embed == "sincos_2d":
        line = torch.from_numpy(_sincos_line(1 << (packing.most - 1).bit_length(), shape.width)).to(some.device)
        patches = torch.cat([line[column], line[row]], dim=1).to(some.dtype)
        return [(patches, patches.new_zeros(shape.prefix, shape.width))]
    side = grid_side(shape)
    of_row, of_column = _taps(row, rows, side), _taps(column, columns, side)  # [T, S]
    if not isinstance(tables, Tensor):
        found = []
        for x, y in zip(*tables, strict=True):
            patches = torch.cat([of_column @ x.float(), of_row @ y.float()], dim=1).to(x.dtype)
            found.append((patches, patches.new_zeros(shape.prefix, shape.width)))
        return found
    own = shape.positions - shape.patches  # rows that are not of patches
    taps = (of_row[:, :, None] * of_column[:, None]).flatten(1)  # [T, S * S]
    return [
        ((taps @ table[own:].float()).to(table.dtype), F.pad(table[:own], (0, 0, 0, shape.prefix - own)))
        for table in tables
    ]


def _taps(number: Tensor, count: Tensor, side: int) -> Tensor:
    """How much of each of `side` entries position `number` of `count` has, float32 [T, side]; corners are aligned."""
    at = number * (side - 1) / (count - 1).clamp(min=1)  # float32 [T]
    return (1 - (at[:, None] - torch.arange(side, device=at.device)).abs()).clamp(min=0)


@lru_cache(maxsize=16)
def _sincos_line(count: int, width: int) -> np.ndarray:
    return sincos_line(count, width).astype(np.float32)


def _on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """From pinned memory to a GPU: any other copy would wait for all that is queued there."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
