"""Colours, blur and inversion of the views that DINO and its kin compare, on the training device.

Each operation is torchvision's of that name, in this order: brightness, contrast, saturation and hue with odds of 0.8,
grey with odds of 0.2, then blur and inversion. Levels are rounded once, before the inversion. What an image gets
depends on its seed alone.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_engine.data.pixels.draws import on_device, uniforms

_STREAM = 4000  # of `uniforms`
_JITTER, _GREY = 0.8, 0.2  # odds
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0.4, 0.4, 0.2, 0.1
_SIGMA = (0.1, 2.0)  # pixels
_RADIUS = 6  # three times the largest sigma
_LUMA = (0.299, 0.587, 0.114)


def distort(images: Tensor, seeds: np.ndarray, *, blur: float, invert: float) -> Tensor:
    """uint8 [B, H, W, 3] -> the same, distorted. seeds: int64 [B], on the host. blur, invert: their odds."""
    drawn = on_device(uniforms(seeds, 9, stream=_STREAM), images.device).float()  # [B, 9]
    jittered, grey, blurred, inverted, brightness, contrast, saturation, hue, sigma = drawn.unbind(1)
    pixels = images.permute(0, 3, 1, 2).float() / 255
    jitter = pixels * _factor(brightness, _BRIGHTNESS)
    jitter = _blend(_luma(jitter.clamp(0, 1)).mean(dim=(1, 2, 3), keepdim=True), jitter, _factor(contrast, _CONTRAST))
    jitter = _blend(_luma(jitter), jitter, _factor(saturation, _SATURATION))
    jitter = turn_hue(jitter, _HUE * (2 * hue - 1))
    pixels = _where(jittered < _JITTER, jitter, pixels)
    pixels = _where(grey < _GREY, _luma(pixels).expand_as(pixels), pixels)
    if blur:
        low, high = _SIGMA
        pixels = _where(blurred < blur, gaussian_blur(pixels, low + (high - low) * sigma), pixels)
    levels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    if invert:
        levels = _where(inverted < invert, torch.where(levels < 128, levels, 255 - levels), levels)
    return levels.permute(0, 2, 3, 1).contiguous()


def turn_hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Turns the hue of floating [B, 3, H, W] in 0..1 by `turn` [B] of the whole circle; value and saturation stay."""
    red, green, blue = pixels.unbind(1)
    value, lowest = pixels.amax(1), pixels.amin(1)
    spread = value - lowest
    safe = spread.clamp(min=1e-12)
    hue = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = torch.where(value == red, (green - blue) / safe, hue)
    hue = torch.where(spread > 0, hue, 0) / 6 + turn[:, None, None]
    # Of each channel: how far from its sector of the circle the hue is, 0 within a sixth and 1 from a third on.
    phase = torch.tensor([5.0, 3.0, 1.0], device=pixels.device)[:, None, None]
    k = torch.remainder(phase + 6 * hue[:, None], 6)  # [B, 3, H, W]
    return value[:, None] - spread[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Blurs floating [B, C, H, W], each image with its own deviation `sigma` [B] in pixels; edges are repeated."""
    batch, channels, height, width = pixels.shape
    distance = torch.arange(-_RADIUS, _RADIUS + 1, device=pixels.device)
    kernel = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)  # [B, 13]
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)  # [B * C, 13]
    rows = F.pad(pixels.reshape(1, batch * channels, height, width), (_RADIUS,) * 4, mode="replicate")
    rows = F.conv2d(rows, kernel[:, None, None, :], groups=batch * channels)
    return F.conv2d(rows, kernel[:, None, :, None], groups=batch * channels).view_as(pixels)


def _factor(drawn: Tensor, strength: float) -> Tensor:
    """[B, 1, 1, 1] between 1 - strength and 1 + strength."""
    return (1 + strength * (2 * drawn - 1))[:, None, None, None]


def _blend(base: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(base.expand_as(pixels), pixels, factor.expand_as(pixels)).clamp(0, 1)


def _luma(pixels: Tensor) -> Tensor:
    """[B, 1, H, W]."""
    weights = torch.tensor(_LUMA, device=pixels.device)[:, None, None]
    return (pixels * weights).sum(dim=1, keepdim=True)


def _where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Images [B, ...] of `one` where `chosen` [B], else of `other`."""
    return torch.where(chosen[:, None, None, None], one, other)
