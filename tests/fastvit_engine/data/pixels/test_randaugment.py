import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from fastvit_engine.data.pixels import randaugment_paper as ra
from fastvit_engine.data.pixels.randaugment import POLICIES, randaugment

STRENGTHS = [-1.0, -0.5, 0.3, 0.9]


def _photo_like(seed: int = 0, height: int = 40, width: int = 56) -> np.ndarray:
    """Smooth colour with an edge, a saturated spot and noise; some levels do not occur."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([40 + 3 * y, 200 - 2 * x, 30 + y + x], axis=2) + generator.integers(0, 30, (height, width, 1))
    image[10:20, 10:20] = 250
    return image.clip(20, 255).astype(np.uint8)


def _apply(operation, image: np.ndarray, strength: float) -> np.ndarray:
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    return operation(pixels, torch.tensor([strength]))[0].permute(1, 2, 0).numpy()


PILLOW = {
    ra.identity: lambda image, s: image,
    ra.auto_contrast: lambda image, s: ImageOps.autocontrast(image),
    ra.equalize: lambda image, s: ImageOps.equalize(image),
    ra.posterize: lambda image, s: ImageOps.posterize(image, 8 - int(4 * abs(s))),
    ra.solarize: lambda image, s: ImageOps.solarize(image, round(256 * (1 - abs(s)) + 0.49)),
    ra.color: lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s),
    ra.contrast: lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
    ra.brightness: lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
    ra.sharpness: lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
}


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("operation", PILLOW, ids=lambda operation: operation.__name__)
def test_colour_operations_are_those_of_pillow(operation, strength):
    image = _photo_like()
    ours = _apply(operation, image, strength).astype(int)
    pillow = np.asarray(PILLOW[operation](Image.fromarray(image), strength)).astype(int)
    assert np.abs(ours - pillow).max() <= 1
    if operation is not ra.identity:
        assert (ours != image).mean() > 0.05


def test_equalize_and_auto_contrast_leave_flat_images():
    flat = np.full((8, 8, 3), 77, np.uint8)
    assert np.array_equal(_apply(ra.equalize, flat, 1), flat)
    assert np.array_equal(_apply(ra.auto_contrast, flat, 1), flat)


@pytest.mark.parametrize(
    ("operation", "matrix"),
    [
        (ra.rotate, lambda s, w, h: (np.cos(t := np.deg2rad(30 * s)), -np.sin(t), 0, np.sin(t), np.cos(t), 0)),
        (ra.shear_x, lambda s, w, h: (1, 0.3 * s, 0, 0, 1, 0)),
        (ra.shear_y, lambda s, w, h: (1, 0, 0, 0.3 * s, 1, 0)),
        (ra.translate_x, lambda s, w, h: (1, 0, 0.45 * w * s, 0, 1, 0)),
        (ra.translate_y, lambda s, w, h: (1, 0, 0, 0, 1, 0.45 * h * s)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_geometric_operations_are_those_of_pillow(operation, matrix, strength):
    image = _photo_like()
    height, width = image.shape[:2]
    a, b, c, d, e, f = matrix(strength, width, height)
    # Pillow's matrix is about the corner of the image, in pixel corners; this moves it to the centre
    x0, y0 = width / 2, height / 2
    about_corner = (a, b, x0 - a * x0 - b * y0 + c, d, e, y0 - d * x0 - e * y0 + f)
    pillow = Image.fromarray(image).transform(
        (width, height), Image.Transform.AFFINE, about_corner, Image.Resampling.BILINEAR, fillcolor=(ra.FILL,) * 3
    )
    ours, pillow = _apply(operation, image, strength).astype(int), np.asarray(pillow).astype(int)
    differs = np.abs(ours - pillow).max(axis=2) > 2
    assert differs.mean() < 0.1  # the border, where Pillow does not blend with the fill


def test_an_image_does_not_depend_on_its_batch():
    images = torch.from_numpy(np.stack([_photo_like(n) for n in range(12)]))
    seeds = np.arange(100, 112)
    whole = randaugment(images, seeds, num_ops=2, magnitude=9)
    assert whole.dtype == torch.uint8 and whole.shape == images.shape
    for part in (slice(0, 1), slice(3, 8), slice(11, 12)):
        assert torch.equal(randaugment(images[part], seeds[part], num_ops=2, magnitude=9), whole[part])
    assert not torch.equal(randaugment(images, seeds + 50, num_ops=2, magnitude=9), whole)


def test_every_operation_is_drawn_equally_often(monkeypatch):
    drawn = dict.fromkeys(range(len(ra.OPERATIONS)), 0)

    def counting(number):
        def operation(pixels, strength):
            drawn[number] += len(pixels)
            return pixels

        return operation

    monkeypatch.setitem(POLICIES, "paper", tuple(counting(n) for n in drawn))
    randaugment(torch.zeros(7000, 1, 1, 3, dtype=torch.uint8), np.arange(7000), num_ops=2, magnitude=5)
    assert sum(drawn.values()) == 14000 and all(880 < count < 1120 for count in drawn.values())


def test_strong_magnitudes_stay_valid():
    images = torch.from_numpy(np.stack([_photo_like(n) for n in range(60)]))
    out = randaugment(images, np.arange(60), num_ops=3, magnitude=20)
    assert out.shape == images.shape and out.float().std() > 10


def test_each_operation_and_each_direction_is_drawn_anew(monkeypatch):
    """Each operation multiplies by 14 and adds its number; or doubles, and adds 1 if its direction is positive."""

    def number_of(number):
        return lambda pixels, strength: pixels * 14 + number

    def direction(pixels, strength):
        assert torch.equal(strength.abs(), torch.full_like(strength, 0.5))
        return pixels * 2 + (strength > 0).to(torch.uint8)[:, None, None, None]

    images, seeds = torch.zeros(4000, 1, 1, 3, dtype=torch.uint8), np.arange(4000)
    monkeypatch.setitem(POLICIES, "paper", [number_of(number) for number in range(14)])
    first, second = np.divmod(randaugment(images, seeds, num_ops=2, magnitude=5.0)[:, 0, 0, 0].numpy(), 14)
    assert np.abs((first == second).mean() - 1 / 14) < 0.02
    for drawn in (first, second):
        assert np.abs(np.bincount(drawn, minlength=14) / 4000 - 1 / 14).max() < 0.02

    monkeypatch.setitem(POLICIES, "paper", [direction] * 14)
    drawn = randaugment(images, seeds, num_ops=2, magnitude=5.0)[:, 0, 0, 0].numpy()  # two bits
    assert np.abs(np.bincount(drawn, minlength=4) / 4000 - 1 / 4).max() < 0.04
