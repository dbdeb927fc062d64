"""Mixup of a batch on the training device."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastvit_kernels.patch_embed.reference import normalise


def mixup(
    images: Tensor,
    labels: Tensor,
    alpha: float,
    mean: Sequence[float],
    std: Sequence[float],
    generator: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mixup of a batch with itself rolled by one (Zhang et al. 2018, arXiv:1710.09412).

    images uint8 [B, H, W, 3], labels int64 [B]. Returns normalised mixed images float32 [B, 3, H, W], labels [B],
    the partners' labels [B] and the weight of `labels` float32 [B]; the loss is weight * loss(labels) + (1 - weight) *
    loss(partners' labels). One weight from Beta(alpha, alpha) a batch, mirrored to [0.5, 1]: `labels` always dominate.
    alpha > 0.
    """
    weight = float(generator.beta(alpha, alpha))
    weight = max(weight, 1 - weight)
    pixels = normalise(images.permute(0, 3, 1, 2), mean, std)
    mixed = torch.lerp(pixels.roll(1, dims=0), pixels, weight)
    return mixed, labels, labels.roll(1, dims=0), torch.full(labels.shape, weight, device=labels.device)
