import numpy as np
import pytest

from fastvit_engine.config import DataConfig
from fastvit_engine.data.augment import eval_transform, inception_crop, train_transform


def _ramp(height: int, width: int) -> np.ndarray:
    """Red rises downwards, green to the right."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 250, height).astype(np.uint8)[:, None]
    image[..., 1] = np.linspace(0, 250, width).astype(np.uint8)[None, :]
    return image


@pytest.mark.parametrize(("height", "width"), [(300, 400), (37, 500), (1, 1), (8, 8)])
def test_inception_crops_stay_within_image_and_ranges(height, width):
    generator = np.random.default_rng(0)
    for _ in range(300):
        top, left, h, w = inception_crop(height, width, (0.05, 1.0), (3 / 4, 4 / 3), generator)
        assert h > 0 and w > 0 and 0 <= top <= height - h and 0 <= left <= width - w
        if (height, width) == (300, 400):
            assert 0.04 < h * w / (height * width) <= 1 and 0.73 < w / h < 1.37


def test_inception_crop_areas_are_uniform_and_places_vary():
    generator = np.random.default_rng(0)
    crops = np.array([inception_crop(1000, 1000, (0.1, 0.5), (1.0, 1.0), generator) for _ in range(4000)])
    areas = crops[:, 2] * crops[:, 3] / 1e6
    assert abs(areas.mean() - 0.3) < 0.01 and areas.min() < 0.11 and areas.max() > 0.49
    assert abs((crops[:, 0] / (1000 - crops[:, 2])).mean() - 0.5) < 0.03


def test_inception_crop_that_never_fits_is_centred():
    assert inception_crop(10, 1000, (1.0, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0)) == (0, 493, 10, 13)
    assert inception_crop(1000, 10, (1.0, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0)) == (493, 0, 13, 10)


def test_train_transform_is_a_function_of_the_generator():
    image, data = _ramp(60, 80), DataConfig()
    first = train_transform(image, 16, data, np.random.default_rng([1, 2, 3]))
    assert first.shape == (16, 16, 3) and first.dtype == np.uint8 and first.flags.c_contiguous
    assert np.array_equal(first, train_transform(image, 16, data, np.random.default_rng([1, 2, 3])))
    assert not np.array_equal(first, train_transform(image, 16, data, np.random.default_rng([1, 2, 4])))


def test_resize_crop_takes_the_whole_image():
    data = DataConfig(crop="resize", flip=False)
    out = train_transform(_ramp(60, 80), 16, data, np.random.default_rng(0))
    assert out[0, 0, 0] < 15 and out[-1, 0, 0] > 235 and out[0, 0, 1] < 15 and out[0, -1, 1] > 235


def test_flip_mirrors_half_of_the_images():
    data = DataConfig(crop="resize")
    mirrored = [train_transform(_ramp(20, 20), 16, data, np.random.default_rng(n))[0, 0, 1] > 125 for n in range(400)]
    assert 160 < sum(mirrored) < 240


def test_eval_transform_takes_the_centre():
    out = eval_transform(_ramp(100, 200), 32, 0.5)  # to 64 x 128, then the middle 32 x 32
    assert out.shape == (32, 32, 3)
    assert abs(int(out[0, 0, 0]) - 250 * 0.25) < 6 and abs(int(out[-1, 0, 0]) - 250 * 0.75) < 6
    assert abs(int(out[0, 0, 1]) - 250 * 0.375) < 6 and abs(int(out[0, -1, 1]) - 250 * 0.625) < 6


@pytest.mark.parametrize(("height", "width"), [(7, 7), (500, 3), (224, 225), (333, 1000)])
@pytest.mark.parametrize("eval_crop", [0.875, 1.0])
def test_eval_transform_of_any_shape(height, width, eval_crop):
    assert eval_transform(_ramp(height, width), 32, eval_crop).shape == (32, 32, 3)


def test_eval_transform_of_right_size_is_the_image():
    assert np.array_equal(eval_transform(_ramp(32, 32), 32, 1.0), _ramp(32, 32))
