"""The images of a batch as training sees them, on the device."""

import numpy as np
import torch
from torch import Tensor

from fastvit_engine.config import AugmentConfig
from fastvit_engine.data import Batch
from fastvit_engine.data.pixels.draws import on_device
from fastvit_engine.data.pixels.randaugment import randaugment
from fastvit_engine.packed_image import HEADER


def augmented_images(batch: Batch, augment: AugmentConfig, device: torch.device) -> Tensor:
    """uint8 [B, H, W, 3], after RandAugment if it is on; crops and flips are made where images are decoded."""
    images = batch.images.to(device, non_blocking=True)
    return _randaugmented(images, batch.seeds, augment) if augment.randaugment_ops else images


def augmented_packed(
    batch: Batch, grids: np.ndarray, patch_size: int, augment: AugmentConfig, device: torch.device
) -> Tensor:
    """As `augmented_images`, of images of different sizes, uint8 [B, K] of `packed_image`.

    grids: what `read_grids` says of them. Images of one size are changed together.
    """
    images = batch.images.to(device, non_blocking=True)
    if not augment.randaugment_ops:
        return images
    changed = images.clone()
    for rows, columns in np.unique(grids, axis=0).tolist():
        alike = np.flatnonzero((grids == (rows, columns)).all(axis=1))
        index, end = on_device(alike, device), HEADER + rows * columns * 3 * patch_size**2
        patches = images[index, HEADER:end].view(-1, rows, columns, patch_size, patch_size, 3)
        whole = patches.transpose(2, 3).reshape(-1, rows * patch_size, columns * patch_size, 3)
        whole = _randaugmented(whole, batch.seeds[alike], augment)
        patches = whole.view(-1, rows, patch_size, columns, patch_size, 3).transpose(2, 3)
        changed[index, HEADER:end] = patches.flatten(1)
    return changed


def _randaugmented(images: Tensor, seeds: np.ndarray, augment: AugmentConfig) -> Tensor:
    return randaugment(
        images,
        seeds,
        num_ops=augment.randaugment_ops,
        magnitude=augment.randaugment_magnitude,
        policy=augment.randaugment_policy,
    )
