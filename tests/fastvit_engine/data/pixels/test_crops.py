from typing import get_args

import numpy as np
import pytest

from fastvit_engine.config import AugmentConfig, EvalTransform
from fastvit_engine.data.pixels.crops import View, draw_crops, eval_view, inception_crop, render, train_view
from fastvit_engine.data.pixels.decode import Decoded, PixelBuffer
from fastvit_engine.data.pixels.draws import uniforms

TRANSFORMS = get_args(EvalTransform)
TRANSFORM = pytest.mark.parametrize("transform", TRANSFORMS)


def _ramp(height: int, width: int) -> np.ndarray:
    """Red rises downwards, green to the right."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 250, height).astype(np.uint8)[:, None]
    image[..., 1] = np.linspace(0, 250, width).astype(np.uint8)[None, :]
    return image


def _render(image: np.ndarray, view: View, size: int, reduction: int = 1) -> np.ndarray:
    out = np.full((size, size, 3), 77, np.uint8)
    render(Decoded(image, reduction=reduction), view, out, PixelBuffer())
    return out


def _train(image: np.ndarray, size: int, augment: AugmentConfig, seed: int) -> np.ndarray:
    view = train_view(*image.shape[:2], size, augment, draw_crops(np.array([seed]))[0])
    return _render(image, view, size)


def _eval(image: np.ndarray, size: int, eval_crop: float, transform: EvalTransform) -> np.ndarray:
    return _render(image, eval_view(*image.shape[:2], size, eval_crop, transform), size)


def _draws(number: int, stream: int = 0) -> list[list[float]]:
    return uniforms(np.arange(number), 40, stream=stream).tolist()


@pytest.mark.parametrize(("height", "width"), [(300, 400), (37, 500), (1, 1), (8, 8)])
def test_inception_crops_stay_within_image_and_ranges(height, width):
    for draws in _draws(300):
        top, left, h, w = inception_crop(height, width, (0.05, 1.0), (3 / 4, 4 / 3), draws)
        assert h > 0 and w > 0 and 0 <= top <= height - h and 0 <= left <= width - w
        if (height, width) == (300, 400):
            assert 0.04 < h * w / (height * width) <= 1 and 0.73 < w / h < 1.37


def test_inception_crop_areas_are_uniform_and_places_vary():
    crops = np.array([inception_crop(1000, 1000, (0.1, 0.5), (1.0, 1.0), draws) for draws in _draws(4000)])
    areas = crops[:, 2] * crops[:, 3] / 1e6
    assert abs(areas.mean() - 0.3) < 0.01 and areas.min() < 0.11 and areas.max() > 0.49
    for axis in (0, 1):
        places = crops[:, axis] / (1000 - crops[:, 2])
        assert abs(places.mean() - 0.5) < 0.03 and places.min() < 0.01 and places.max() == 1


def test_inception_crop_ratios_are_log_uniform():
    crops = np.array([inception_crop(1000, 1000, (0.05, 0.1), (1 / 4, 4.0), draws) for draws in _draws(4000)])
    places = (np.log(crops[:, 3] / crops[:, 2]) / np.log(4) + 1) / 2  # of the ratio in its range
    assert np.abs(np.quantile(places, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.03


def test_inception_crop_that_never_fits_is_centred():
    draws = [0.5] * 40
    assert inception_crop(10, 1000, (1.0, 1.0), (3 / 4, 4 / 3), draws) == (0, 493, 10, 13)
    assert inception_crop(1000, 10, (1.0, 1.0), (3 / 4, 4 / 3), draws) == (493, 0, 13, 10)


def test_training_crop_is_a_function_of_the_seed():
    image, augment = _ramp(60, 80), AugmentConfig()
    first = _train(image, 16, augment, 123)
    assert np.array_equal(first, _train(image, 16, augment, 123))
    assert not np.array_equal(first, _train(image, 16, augment, 124))


def test_only_training_decodes_fast():
    decoding = {transform: eval_view(600, 800, 16, 0.875, transform).decoding for transform in TRANSFORMS}
    assert decoding == {"timm": "accurate", "big_vision": "tensorflow", "fast": "accurate"}
    assert train_view(60, 80, 16, AugmentConfig(), draw_crops(np.array([1]))[0]).decoding == "fast"


def test_exact_evaluation_decodes_at_full_size():
    reductions = {transform: eval_view(600, 800, 16, 0.875, transform).reduction for transform in TRANSFORMS}
    assert reductions == {"timm": 1, "big_vision": 1, "fast": 8}


def test_resize_crop_takes_the_whole_image():
    out = _train(_ramp(60, 80), 16, AugmentConfig(crop="resize", flip=False), 0)
    assert out[0, 0, 0] < 15 and out[-1, 0, 0] > 235 and out[0, 0, 1] < 15 and out[0, -1, 1] > 235


def test_flip_mirrors_half_of_the_images():
    augment = AugmentConfig(crop="resize")
    mirrored = [_train(_ramp(20, 20), 16, augment, seed)[0, 0, 1] > 125 for seed in range(400)]
    assert 160 < sum(mirrored) < 240


@pytest.mark.parametrize(("scale", "ratio"), [(0.5, 1.0), (0.1, 2.0), (0.3, 0.5)])
def test_random_crops_have_the_share_and_the_shape_that_are_configured(scale, ratio):
    augment = AugmentConfig(crop="inception", crop_scale=(scale, scale), crop_ratio=(ratio, ratio))
    for draws in draw_crops(np.arange(50)):
        view = train_view(1000, 1000, 16, augment, draws)
        assert view.height * view.width == pytest.approx(scale * 1000 * 1000, rel=0.01)
        assert view.width / view.height == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize(("short", "corner"), [(32, 0), (33, 0), (34, 1), (35, 2), (37, 2), (39, 4)])
def test_the_centre_of_timm_rounds_halves_to_even(short, corner):
    """As `int(round(difference / 2))` of torchvision's CenterCrop."""
    view = eval_view(short, short, 32, 32 / (short + 0.5), "timm")
    assert (view.resized, view.corner) == ((short, short), (corner, corner))


def test_without_flip_no_image_is_mirrored():
    augment = AugmentConfig(crop="resize", flip=False)
    assert not any(_train(_ramp(20, 20), 16, augment, seed)[0, 0, 1] > 125 for seed in range(40))


def test_mirrored_view_is_the_other_one_mirrored():
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    view = View(5, 9, 31, 43, resized=(24, 24))
    assert np.array_equal(_render(image, view._replace(mirrored=True), 24), _render(image, view, 24)[:, ::-1])


def test_reduction_keeps_at_least_the_pixels_that_are_needed():
    for (height, width), reduction in {
        (223, 500): 1,
        (448, 447): 1,
        (448, 449): 2,
        (1000, 900): 4,
        (9000, 9000): 8,
    }.items():
        assert View(0, 0, height, width, resized=(224, 224)).reduction == reduction


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_view_of_an_image_that_was_decoded_smaller(reduction):
    image = _ramp(16 * 40 + 3, 16 * 50 + 5)
    small = image[reduction // 2 :: reduction, reduction // 2 :: reduction]
    view = View(101, 203, 400, 420, resized=(32, 32))
    whole, reduced = _render(image, view, 32), _render(small, view, 32, reduction)
    assert np.abs(whole.astype(int) - reduced).max() <= 4


@TRANSFORM
def test_eval_view_takes_the_centre(transform):
    out = _eval(_ramp(100, 200), 32, 0.5, transform)  # to 64 x 128, then the middle 32 x 32
    assert out.shape == (32, 32, 3)
    assert abs(int(out[0, 0, 0]) - 250 * 0.25) < 6 and abs(int(out[-1, 0, 0]) - 250 * 0.75) < 6
    assert abs(int(out[0, 0, 1]) - 250 * 0.375) < 6 and abs(int(out[0, -1, 1]) - 250 * 0.625) < 6


@pytest.mark.parametrize(("height", "width"), [(7, 7), (500, 3), (224, 225), (333, 1000)])
@pytest.mark.parametrize("eval_crop", [0.875, 1.0])
@TRANSFORM
def test_eval_view_fills_the_image_whatever_the_shape(height, width, eval_crop, transform):
    assert (_eval(np.zeros((height, width, 3), np.uint8), 32, eval_crop, transform) == 0).all()


@TRANSFORM
def test_eval_view_of_right_size_is_the_image(transform):
    assert np.array_equal(_eval(_ramp(32, 32), 32, 1.0, transform), _ramp(32, 32))
