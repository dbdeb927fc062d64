"""The fourteen operations of RandAugment's authors, on whole batches (Cubuk et al. 2020, arXiv:1909.13719).

Images are uint8 before and after every operation, as in Pillow, whose colour operations these equal to within one
level.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FILL = 128  # grey level of what a geometric operation brings in from outside the image

# An operation takes uint8 [n, 3, H, W] and strengths [n], whose sign is the direction, and gives uint8 [n, 3, H, W].


def identity(pixels: Tensor, strength: Tensor) -> Tensor:
    return pixels


def auto_contrast(pixels: Tensor, strength: Tensor) -> Tensor:
    """Stretches each channel to 0..255."""
    low, high = pixels.amin(dim=(2, 3)).float(), pixels.amax(dim=(2, 3)).float()  # [n, 3]
    factor = torch.where(high > low, 255 / (high - low).clamp(min=1), 1.0)
    offset = torch.where(high > low, low, 0.0)
    return _to_uint8((pixels.float() - offset[..., None, None]) * factor[..., None, None])


def equalize(pixels: Tensor, strength: Tensor) -> Tensor:
    """Makes the levels of each channel equally frequent."""
    images, channels, height, width = pixels.shape
    levels = pixels.reshape(images * channels, height * width).long()
    ones = torch.ones_like(levels)
    histogram = torch.zeros(images * channels, 256, dtype=torch.int64, device=pixels.device).scatter_add_(
        1, levels, ones
    )
    brightest = levels.amax(dim=1, keepdim=True)
    step = (height * width - histogram.gather(1, brightest)) // 255  # [n * 3, 1]
    below = histogram.cumsum(dim=1) - histogram
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=pixels.device))
    return table.gather(1, levels).to(torch.uint8).view_as(pixels)


def posterize(pixels: Tensor, strength: Tensor) -> Tensor:
    """Keeps 8 - 4 * strength bits a channel, at least one."""
    dropped = (4 * strength.abs()).floor().clamp(max=7).to(torch.int32)[:, None, None, None]
    return ((pixels.to(torch.int32) >> dropped) << dropped).to(torch.uint8)


def solarize(pixels: Tensor, strength: Tensor) -> Tensor:
    """Inverts levels from 256 * (1 - strength) on."""
    threshold = (256 * (1 - strength.abs())).clamp(min=0)[:, None, None, None]
    return torch.where(pixels.float() < threshold, pixels, 255 - pixels)


def color(pixels: Tensor, strength: Tensor) -> Tensor:
    return _blend(_grey(pixels).float(), pixels, strength)


def contrast(pixels: Tensor, strength: Tensor) -> Tensor:
    grey = _grey(pixels).long()
    size = grey[0].numel()
    mean = (2 * grey.sum(dim=(1, 2, 3)) + size) // (2 * size)  # rounded; whole numbers, so the order of sums is nothing
    return _blend(mean.float()[:, None, None, None], pixels, strength)


def brightness(pixels: Tensor, strength: Tensor) -> Tensor:
    return _blend(torch.zeros((), device=pixels.device), pixels, strength)


def sharpness(pixels: Tensor, strength: Tensor) -> Tensor:
    return _blend(smooth(pixels, rounding=0.5), pixels, strength)


def smooth(pixels: Tensor, *, rounding: float) -> Tensor:
    """Blurs as Pillow's SMOOTH filter; the border stays as it is. rounding: 0.5 rounds, 0 cuts off."""
    blurred = pixels.float()
    if min(pixels.shape[2:]) > 2:
        kernel = torch.ones(3, 1, 3, 3, device=pixels.device)
        kernel[:, :, 1, 1] = 5
        inner = F.conv2d(blurred, kernel, groups=3)  # whole numbers below 2 ** 24: exact
        blurred = blurred.clone()
        blurred[:, :, 1:-1, 1:-1] = (inner / 13).add(rounding).floor()
    return blurred


def rotate(pixels: Tensor, strength: Tensor) -> Tensor:
    """By 30 degrees * strength."""
    angle = torch.deg2rad(30 * strength)
    cos, sin = angle.cos(), angle.sin()
    return _transform(pixels, cos, -sin, 0, sin, cos, 0)


def shear_x(pixels: Tensor, strength: Tensor) -> Tensor:
    return _transform(pixels, 1, 0.3 * strength, 0, 0, 1, 0)


def shear_y(pixels: Tensor, strength: Tensor) -> Tensor:
    return _transform(pixels, 1, 0, 0, 0.3 * strength, 1, 0)


def translate_x(pixels: Tensor, strength: Tensor) -> Tensor:
    """By 0.45 of the width * strength."""
    return _transform(pixels, 1, 0, 0.45 * pixels.shape[3] * strength, 0, 1, 0)


def translate_y(pixels: Tensor, strength: Tensor) -> Tensor:
    return _transform(pixels, 1, 0, 0, 0, 1, 0.45 * pixels.shape[2] * strength)


OPERATIONS: tuple[Callable[..., Tensor], ...] = (
    identity,
    auto_contrast,
    equalize,
    rotate,
    solarize,
    color,
    posterize,
    contrast,
    brightness,
    sharpness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
)


def _grey(pixels: Tensor) -> Tensor:
    """Luma as in Pillow (ITU-R 601-2), [n, 1, H, W], in whole numbers."""
    red, green, blue = pixels.to(torch.int32).unbind(dim=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).unsqueeze(1)


def _blend(base: Tensor, pixels: Tensor, strength: Tensor) -> Tensor:
    """From `base` (0) through the image (1) and beyond: 1 + 0.9 * strength, which is never below 0."""
    factor = (1 + 0.9 * strength).clamp(min=0)[:, None, None, None]
    return _to_uint8(base + factor * (pixels.float() - base))


def _to_uint8(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _transform(
    pixels: Tensor,
    a: Tensor | float,
    b: Tensor | float,
    c: Tensor | float,
    d: Tensor | float,
    e: Tensor | float,
    f: Tensor | float,
) -> Tensor:
    """The pixel at (x, y) from the image's centre comes from (a x + b y + c, d x + e y + f), bilinearly."""
    images, _, height, width = pixels.shape
    x = torch.arange(width, device=pixels.device) - (width - 1) / 2
    y = torch.arange(height, device=pixels.device)[:, None] - (height - 1) / 2
    a, b, c, d, e, f = (
        v[:, None, None] if isinstance(v, Tensor) else torch.full((images, 1, 1), float(v), device=pixels.device)
        for v in (a, b, c, d, e, f)
    )
    # grid_sample wants the image's corners at -1 and 1
    grid = torch.stack(((a * x + b * y + c) * (2 / width), (d * x + e * y + f) * (2 / height)), dim=3)  # [n, H, W, 2]
    centred = pixels.float() - FILL  # outside is 0 to grid_sample
    return _to_uint8(F.grid_sample(centred, grid, padding_mode="zeros", align_corners=False) + FILL)
