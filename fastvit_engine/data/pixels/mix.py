"""Mixup and CutMix of a batch, on the training device.

Images are mixed in pairs: 2i with 2i + 1. A pair's weight comes from the seed of its first image, so a mixed image
depends on the two images of the pair only, not on the batch, the process or the number of processes they are in.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvit_engine.data.pixels.draws import on_device, uniforms
from fastvit_kernels.patch_embed.reference import normalise

_STREAM = 1000  # of `uniforms`; those of RandAugment count from 0


class Mixed(NamedTuple):
    """The loss is weight * loss(labels) + (1 - weight) * loss(labels_b)."""

    images: Tensor  # float32 [B, 3, H, W], normalised; uint8 [B, H, W, 3] where CutMix alone is on
    labels: Tensor  # as they were given
    labels_b: Tensor  # those of the partner
    weight: Tensor  # float32 [B], the share of the image itself: at least 1/2 in mixup
    partner: Tensor  # int64 [B]: which image it is mixed with


def mix(
    images: Tensor,
    labels: Tensor,
    seeds: np.ndarray,
    *,
    mixup: float,
    cutmix: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Mixed:
    """Mixup (Zhang et al. 2018, arXiv:1710.09412) or CutMix (Yun et al. 2019, arXiv:1905.04899) of a batch.

    Args:
        images: uint8 [B, H, W, 3]; the last one of an odd batch stays as it is.
        labels: [B] or [B, ...], of each image.
        seeds: int64 [B], on the host.
        mixup, cutmix: alpha of their Beta(alpha, alpha) distributions of weights; 0: off. With both on, each pair takes
            either by the toss of a coin.
    """
    batch, height, width, _ = images.shape
    pairs = batch // 2
    partner = np.arange(batch)
    partner[: 2 * pairs] ^= 1
    weight, top, bottom, left, right = _draw(seeds[0 : 2 * pairs : 2], mixup, cutmix, height, width)  # each [pairs]
    numbers = np.zeros((6, batch), np.float32)
    numbers[0] = 1
    numbers[:5, : 2 * pairs] = np.repeat([weight, top, bottom, left, right], 2, axis=1)
    numbers[5] = partner
    copied = on_device(numbers, images.device)  # all at once
    weight_, box, other = copied[0], copied[1:5, :, None], copied[5].long()

    row = torch.arange(height, device=images.device)
    column = torch.arange(width, device=images.device)
    rows = (row >= box[0]) & (row < box[1])  # [B, H]
    columns = (column >= box[2]) & (column < box[3])  # [B, W]
    inside = rows[:, :, None] & columns[:, None, :]  # [B, H, W], empty for mixup
    cut = torch.where(inside[..., None], images[other], images)
    if mixup == 0:
        return Mixed(cut, labels, labels[other], weight_, other)
    pixels = normalise(cut.permute(0, 3, 1, 2), mean, std)
    is_cut = (box[1] > box[0]).view(-1, 1, 1, 1)
    blended = torch.lerp(pixels[other], pixels, weight_.view(-1, 1, 1, 1))
    return Mixed(torch.where(is_cut, pixels, blended), labels, labels[other], weight_, other)


def _draw(seeds: np.ndarray, mixup: float, cutmix: float, height: int, width: int) -> np.ndarray:
    """(weight, top, bottom, left, right) of each pair: the box is what CutMix exchanges, or empty."""
    drawn = np.zeros((5, len(seeds)))
    coin, place_y, place_x = uniforms(seeds, 3, stream=_STREAM).T
    for i, seed in enumerate(seeds.astype(np.uint64)):
        cuts = cutmix > 0 and (mixup == 0 or coin[i] < 0.5)
        alpha = cutmix if cuts else mixup
        weight = np.random.Generator(np.random.Philox(key=seed)).beta(alpha, alpha)
        if not cuts:
            drawn[0, i] = max(weight, 1 - weight)  # the label that is named first dominates
            continue
        side = np.sqrt(1 - weight)
        centre = place_y[i] * height, place_x[i] * width
        top, bottom = (np.clip(round(centre[0] + sign * side * height / 2), 0, height) for sign in (-1, 1))
        left, right = (np.clip(round(centre[1] + sign * side * width / 2), 0, width) for sign in (-1, 1))
        drawn[:, i] = 1 - (bottom - top) * (right - left) / (height * width), top, bottom, left, right
    return drawn
