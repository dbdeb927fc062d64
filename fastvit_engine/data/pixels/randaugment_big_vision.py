"""The sixteen operations of big_vision's `randaugment`, which recipes for its baselines use.

They are those of the TensorFlow code that EfficientNet was published with, peculiarities included: strengths go in one
direction for colours, geometry is about the upper left corner and takes the nearest pixel, results are cut off rather
than rounded, and the grey of `contrast` depends on the size of the image, not on its pixels. Each is equal to what
TensorFlow computes to within one level: tests/fastvit_engine/data/pixels/test_randaugment_big_vision.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastvit_engine.data.pixels.randaugment_paper import FILL, equalize, smooth

# An operation takes uint8 [n, 3, H, W] and strengths [n], whose sign is the direction, and gives uint8 [n, 3, H, W];
# `cutout` also takes a place. A strength of 1 is their magnitude 10.


def auto_contrast(pixels: Tensor, strength: Tensor) -> Tensor:
    """Stretches each channel to 0..255."""
    low, high = pixels.amin(dim=(2, 3), keepdim=True).float(), pixels.amax(dim=(2, 3), keepdim=True).float()
    scale = 255 / (high - low).clamp(min=1)
    return torch.where(high > low, _to_uint8(pixels * scale - low * scale), pixels)


def invert(pixels: Tensor, strength: Tensor) -> Tensor:
    return 255 - pixels


def rotate(pixels: Tensor, strength: Tensor) -> Tensor:
    """By 30 degrees * strength about the centre."""
    height, width = pixels.shape[2:]
    angle = torch.deg2rad(30 * strength)
    cos, sin = angle.cos(), angle.sin()
    x, y = (width - 1) / 2, (height - 1) / 2
    return _transform(pixels, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def posterize(pixels: Tensor, strength: Tensor) -> Tensor:
    """Keeps 4 * strength bits, at least one: stronger is weaker."""
    bits = (4 * strength.abs()).int()
    dropped = (8 - bits).clamp(0, 7)[:, None, None, None]
    return ((pixels.int() >> dropped) << dropped).to(torch.uint8)


def solarize(pixels: Tensor, strength: Tensor) -> Tensor:
    """Inverts levels from 256 * strength on, modulo 256, since the threshold is uint8 there: all of them at 1."""
    threshold = ((256 * strength.abs()).int() % 256)[:, None, None, None]
    return torch.where(pixels < threshold, pixels, 255 - pixels)


def solarize_add(pixels: Tensor, strength: Tensor) -> Tensor:
    """Adds 110 * strength to levels below 128."""
    addition = (110 * strength.abs()).int()[:, None, None, None]
    return torch.where(pixels < 128, (pixels.int() + addition).clamp(max=255).to(torch.uint8), pixels)


def color(pixels: Tensor, strength: Tensor) -> Tensor:
    weights = torch.tensor([0.2989, 0.5870, 0.1140], device=pixels.device).view(3, 1, 1)
    grey = (255.5 * (pixels / 255 * weights).sum(dim=1, keepdim=True)).floor()  # [n, 1, H, W]
    return _blend(grey, pixels, strength)


def contrast(pixels: Tensor, strength: Tensor) -> Tensor:
    """Away from a grey that is the number of pixels / 256: the sum of the histogram, which was to be a mean."""
    height, width = pixels.shape[2:]
    grey = min(height * width // 256, 255)
    return _blend(torch.tensor(float(grey), device=pixels.device), pixels, strength)


def brightness(pixels: Tensor, strength: Tensor) -> Tensor:
    return _blend(torch.zeros((), device=pixels.device), pixels, strength)


def sharpness(pixels: Tensor, strength: Tensor) -> Tensor:
    return _blend(smooth(pixels, rounding=0), pixels, strength)


def shear_x(pixels: Tensor, strength: Tensor) -> Tensor:
    return _transform(pixels, 1, 0.3 * strength, 0, 0, 1, 0)


def shear_y(pixels: Tensor, strength: Tensor) -> Tensor:
    return _transform(pixels, 1, 0, 0, 0.3 * strength, 1, 0)


def translate_x(pixels: Tensor, strength: Tensor) -> Tensor:
    """By 100 pixels * strength, whatever the size of the image."""
    return _transform(pixels, 1, 0, 100 * strength, 0, 1, 0)


def translate_y(pixels: Tensor, strength: Tensor) -> Tensor:
    return _transform(pixels, 1, 0, 0, 0, 1, 100 * strength)


def cutout(pixels: Tensor, strength: Tensor, place: Tensor) -> Tensor:
    """Greys a square of 80 pixels * strength about the place, given by [n, 2] numbers in [0, 1)."""
    height, width = pixels.shape[2:]
    half = (40 * strength.abs()).int()[:, None]  # [n, 1]
    y, x = (place[:, 0:1] * height).int(), (place[:, 1:2] * width).int()
    row, column = (torch.arange(size, device=pixels.device) for size in (height, width))
    rows = (row >= y - half) & (row < y + half)  # [n, H]
    columns = (column >= x - half) & (column < x + half)  # [n, W]
    grey = torch.tensor(FILL, dtype=torch.uint8, device=pixels.device)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], grey, pixels)


OPERATIONS: tuple[Callable[..., Tensor], ...] = (
    auto_contrast,
    equalize,
    invert,
    rotate,
    posterize,
    solarize,
    color,
    contrast,
    brightness,
    sharpness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
    cutout,
    solarize_add,
)


def _blend(base: Tensor, pixels: Tensor, strength: Tensor) -> Tensor:
    """From `base` (0) through the image (1) and beyond: 0.1 + 1.8 * strength."""
    factor = (0.1 + 1.8 * strength.abs().double()).float()[:, None, None, None]
    return _to_uint8(base + factor * (pixels.float() - base))


def _to_uint8(pixels: Tensor) -> Tensor:
    return pixels.clamp(0, 255).to(torch.uint8)  # cuts off


def _transform(
    pixels: Tensor,
    a: Tensor | float,
    b: Tensor | float,
    c: Tensor | float,
    d: Tensor | float,
    e: Tensor | float,
    f: Tensor | float,
) -> Tensor:
    """The pixel at (x, y) is the one nearest to (a x + b y + c, d x + e y + f); what comes from outside is grey."""
    images, channels, height, width = pixels.shape
    x = torch.arange(width, device=pixels.device)
    y = torch.arange(height, device=pixels.device)[:, None]
    a, b, c, d, e, f = (
        v[:, None, None] if isinstance(v, Tensor) else torch.full((images, 1, 1), float(v), device=pixels.device)
        for v in (a, b, c, d, e, f)
    )
    from_x, from_y = _round(a * x + b * y + c), _round(d * x + e * y + f)  # [n, H, W]
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    source = from_y.clamp(0, height - 1) * width + from_x.clamp(0, width - 1)
    found = pixels.flatten(2).gather(2, source.view(images, 1, -1).expand(-1, channels, -1)).view_as(pixels)
    grey = torch.tensor(FILL, dtype=torch.uint8, device=pixels.device)
    return torch.where(inside[:, None], found, grey)


def _round(x: Tensor) -> Tensor:
    """To whole numbers, halves away from 0."""
    return (x.sign() * (x.abs() + 0.5).floor()).long()
