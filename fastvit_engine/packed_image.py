"""The form in which a batch holds images of different sizes: a header with the grid of patches, then the patches.

Every image of a batch has a row of as many bytes, so that rows can be cut, joined and shared between processes as those
of any other batch. What is behind the last patch of an image is never read.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

HEADER = 8  # bytes: rows and columns of patches and the patch size in pixels, as uint16, and two that are 0


def packed_bytes(max_tokens: int, patch_size: int) -> int:
    """Length of the row of an image with at most so many patches."""
    return HEADER + max_tokens * 3 * patch_size**2


def write_packed(image: np.ndarray, patch_size: int, out: np.ndarray) -> None:
    """Writes an image, uint8 [h * P, w * P, 3], to `out`, uint8 of `packed_bytes`."""
    rows, columns = image.shape[0] // patch_size, image.shape[1] // patch_size
    out[:HEADER].view(np.uint16)[:] = rows, columns, patch_size, 0
    patches = out[HEADER : HEADER + image.size].reshape(rows, columns, patch_size, patch_size, 3)
    patches[:] = image.reshape(rows, patch_size, columns, patch_size, 3).swapaxes(1, 2)


def read_packed(row: Any) -> np.ndarray:
    """The image, uint8 [h * P, w * P, 3], in the row of a batch; of padding, one black pixel."""
    row = np.asarray(row)
    rows, columns, patch_size, _ = np.maximum(row[:HEADER].copy().view(np.uint16).astype(np.int64), 1)
    size = rows * columns * 3 * patch_size**2
    patches = row[HEADER : HEADER + size].reshape(rows, columns, patch_size, patch_size, 3)
    return np.ascontiguousarray(patches.swapaxes(1, 2)).reshape(rows * patch_size, columns * patch_size, 3)


def read_grids(images: Tensor) -> np.ndarray:
    """Rows and columns of patches of each image of a batch, int64 [B, 2], on the host.

    Padding, which is zeros, is one black patch. images: uint8 [B, K]; those of a GPU are waited for.
    """
    header = images[:, :HEADER].cpu().contiguous().numpy().view(np.uint16)[:, :2]
    return np.maximum(header.astype(np.int64), 1)


def pixels_of(image: Tensor) -> Tensor:
    """The image of a batch, in this form or not, as uint8 [H, W, 3]."""
    return torch.from_numpy(read_packed(image)) if image.ndim == 1 else image


def is_packed(images: Tensor) -> bool:
    """Whether images of a batch that a model gets are in this form: others have three dimensions each."""
    return images.ndim == 2 and images.dtype == torch.uint8
