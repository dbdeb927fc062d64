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
    register_tokens: Tensor | None,
    keep_indices: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    if images.dtype == torch.uint8:
        images = normalise(images, mean, std)
    batch, has_cls = images.shape[0], cls_token is not None
    patches = to_patches(images.to(weight.dtype), weight.shape[-1])
    tokens = F.linear(keep(patches, keep_indices), weight.flatten(1), bias)  # [B, K, D]
    tokens = tokens.to(bias.dtype)  # autocast gives its own, the tokens stay in that of the parameters
    if pos_embed is not None:
        tokens = tokens + keep(pos_embed[:, has_cls:], keep_indices)
    prefix = prefix_tokens(pos_embed, cls_token, register_tokens)
    return torch.cat([*(token.expand(batch, -1, -1) for token in prefix), tokens], dim=1) if prefix else tokens


def prefix_tokens(pos_embed: Tensor | None, cls_token: Tensor | None, register_tokens: Tensor | None) -> list[Tensor]:
    """What comes before the patches of every image: [1, 1, D] and [1, R, D], as far as there are any."""
    prefix = []
    if cls_token is not None:
        prefix.append(cls_token if pos_embed is None else cls_token + pos_embed[:, :1])
    if register_tokens is not None:
        prefix.append(register_tokens)
    return prefix


def keep(patches: Tensor, indices: Tensor | None) -> Tensor:
    """The patches at these indices [B, K] of each image, all for None: [B or 1, N, *] -> [B, K, *]."""
    return patches if indices is None else patches.take_along_dim(indices[:, :, None], dim=1)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 - mean) / std in float32: uint8 [B, 3, H, W] -> float32 [B, 3, H, W]."""
    pixels = images.to(torch.float32) / 255
    return (pixels - per_channel(mean, images.device)) / per_channel(std, images.device)


def per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """float32 [C, 1, 1], written on the device: copies from the host cannot be captured in a CUDA graph."""
    return torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values])


def to_patches(images: Tensor, patch: int) -> Tensor:
    """[B, 3, H, W] -> [B, N, 3*P*P]: patches row by row, the values of one in the order of a Conv2d weight."""
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
