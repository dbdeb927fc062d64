"""Crops at their own proportions, against the squares that they would be otherwise."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvit_engine.config import AugmentConfig, Config
from fastvit_engine.data.pixels.crops import eval_view, render
from fastvit_engine.data.pixels.decode import Decoded, PixelBuffer
from fastvit_engine.data.pixels.draws import sample_seeds
from fastvit_engine.data.pixels.native import Patches, fitting_grid, native_eval_view
from fastvit_engine.data.pixels.views import (
    choose_views,
    draw_views,
    eval_shape,
    eval_views,
    images_shape,
    render_views,
    training_views,
)
from fastvit_engine.packed_image import read_packed


def config_of(least: int | None = None, crop: str = "inception", **data: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"name": "Ti/4", "image_size": 24, "num_classes": 3},
            "packing": {"max_patches": 36, "min_patches": least},
            "augment": {"crop": crop},
            "data": data,
        }
    )


@pytest.mark.parametrize(
    ("height", "width", "most", "expected"),
    [
        (100, 100, 36, (6, 6)),
        (100, 100, 35, (5, 5)),
        (200, 100, 36, (8, 4)),
        (100, 200, 36, (4, 8)),
        (3, 4, 36, (5, 6)),
        (1, 5000, 36, (1, 36)),
        (5000, 1, 36, (36, 1)),
        (30, 40, 1, (1, 1)),
        (7, 5, 2, (1, 1)),
        (10, 5, 2, (2, 1)),
    ],
)
def test_grids(height: int, width: int, most: int, expected: tuple[int, int]) -> None:
    assert fitting_grid(height, width, most, 4)[:2] == expected


def test_a_grid_is_never_larger_and_hardly_smaller_or_distorted() -> None:
    draw = np.random.default_rng(0)
    for _ in range(2000):
        height, width, most = (int(number) for number in draw.integers(1, 3000, 3))
        rows, columns, _ = fitting_grid(height, width, most, 16)
        assert 1 <= rows * columns <= most
        if max(height, width) * 16 < min(height, width) * most:  # no side is near one patch
            assert rows + 1 > (most * height / width) ** 0.5 and columns + 1 > (most * width / height) ** 0.5


@pytest.mark.parametrize("crop", ["inception", "tensorflow", "resize"])
def test_the_box_is_that_of_a_square_and_keeps_its_proportions(crop: str) -> None:
    config = config_of(crop=crop)
    square = config.model_copy(update={"packing": Config().packing})
    seeds = sample_seeds(0, np.arange(50))
    packed, plain = training_views(config), training_views(square)
    drawn = zip(draw_views(seeds, packed), draw_views(seeds, plain), strict=True)
    for of_packed, of_plain in drawn:
        [one], [other] = choose_views(90, 160, packed, of_packed), choose_views(90, 160, plain, of_plain)
        assert one[:4] == other[:4] and (one.mirrored, one.decoding) == (other.mirrored, other.decoding)
        assert one.grid is not None and one.resized == one.grid.pixels
        assert one.grid[:2] == fitting_grid(one.height, one.width, 36, 4)[:2]
    assert other.grid is None and other.resized == (24, 24)


def test_counts_are_uniform_and_a_function_of_the_seed() -> None:
    patches = Patches.of(config_of(least=5))
    assert patches is not None
    seeds = sample_seeds(3, np.arange(32_000))
    counts = np.array([patches.count(drawn) for drawn in patches.draw(seeds)])
    assert sorted(set(counts)) == list(range(5, 37))
    assert np.bincount(counts)[5:].min() > 850 and np.bincount(counts).max() < 1150  # 1,000 each, 31 the deviation
    assert counts[7000:7003].tolist() == [patches.count(drawn) for drawn in patches.draw(seeds[7000:7003])]
    assert {Patches(4, 36, 36).count(drawn) for drawn in patches.draw(seeds[:100])} == {36}


@pytest.mark.parametrize("transform", ["timm", "big_vision", "fast"])
@pytest.mark.parametrize("eval_crop", [0.875, 1.0])
def test_a_square_image_is_evaluated_as_a_square(transform: str, eval_crop: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (57, 57, 3), dtype=np.uint8)
    config = config_of(eval_crop=eval_crop, eval_transform=transform)
    out = np.empty(eval_shape(config), np.uint8)
    chosen = eval_views(config)(57, 57)
    render_views(Decoded(pixels), chosen, [], out, PixelBuffer())
    expected = np.empty((24, 24, 3), np.uint8)
    view = eval_view(57, 57, 24, eval_crop, transform)
    assert chosen[0].reduction == view.reduction
    render(Decoded(pixels), view, expected, PixelBuffer())
    assert np.array_equal(read_packed(out), expected)


def test_evaluation_keeps_proportions() -> None:
    pixels = np.zeros((60, 120, 3), np.uint8)
    pixels[:, 60:] = 255
    config = config_of(eval_crop=1.0)
    out = np.empty(eval_shape(config), np.uint8)
    render_views(Decoded(pixels), eval_views(config)(60, 120), [], out, PixelBuffer())
    image = read_packed(out)
    assert image.shape == (16, 32, 3)
    resized = np.asarray(Image.fromarray(pixels).resize((32, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(image, resized)
    cropped = native_eval_view(60, 120, Patches(4, 36, 36), 0.5, "timm")
    assert cropped.resized == (32, 64) and cropped.corner == (8, 16)


def test_a_training_crop_is_the_resized_box() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    config = config_of(crop="resize")
    views = training_views(config)
    [draws] = draw_views(sample_seeds(0, np.arange(1)), views)
    out = np.empty(images_shape(views), np.uint8)
    chosen = choose_views(50, 70, views, draws)
    render_views(Decoded(pixels), chosen, [], out, PixelBuffer())
    image = read_packed(out)
    assert image.shape == (20, 28, 3)
    expected = np.empty_like(image)
    render(Decoded(pixels), chosen[0]._replace(mirrored=False), expected, PixelBuffer())
    assert np.array_equal(image, expected[:, ::-1] if chosen[0].mirrored else expected)
    assert AugmentConfig().flip
