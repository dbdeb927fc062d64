"""The images of a batch as training sees them, on the device."""

import torch
from torch import Tensor

from fastvit_engine.config import AugmentConfig
from fastvit_engine.data import Batch
from fastvit_engine.data.pixels.randaugment import randaugment


def augmented_images(batch: Batch, augment: AugmentConfig, device: torch.device) -> Tensor:
    """uint8 [B, H, W, 3], after RandAugment if it is on; crops and flips are made where images are decoded."""
    images = batch.images.to(device, non_blocking=True)
    if not augment.randaugment_ops:
        return images
    return randaugment(
        images,
        batch.seeds,
        num_ops=augment.randaugment_ops,
        magnitude=augment.randaugment_magnitude,
        policy=augment.randaugment_policy,
    )
