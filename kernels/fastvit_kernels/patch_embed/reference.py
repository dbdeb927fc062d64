"""Patch embedding in plain PyTorch: the CPU path and the oracle."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    if images.dtype == torch.uint8:
        images = normalise(images, mean, std)
    patches = to_patches(images.to(weight.dtype), weight.shape[-1])
    tokens = F.linear(patches, weight.flatten(1), bias)  # [B, N, D]
    if cls_token is not None:
        tokens = torch.cat([cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)  # [B, 1 + N, D]
    return tokens if pos_embed is None else tokens + pos_embed


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 - mean) / std in float32: uint8 [B, 3, H, W] -> float32 [B, 3, H, W]."""
    pixels = images.to(torch.float32) / 255
    centre = torch.tensor(mean, dtype=torch.float32, device=images.device).view(3, 1, 1)
    spread = torch.tensor(std, dtype=torch.float32, device=images.device).view(3, 1, 1)
    return (pixels - centre) / spread


def to_patches(images: Tensor, patch: int) -> Tensor:
    """[B, 3, H, W] -> [B, N, 3*P*P]: patches row by row, the values of one in the order of a Conv2d weight."""
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)
