"""Evaluation pixels are those of timm and of big_vision, from the encoded image to the crop, to the bit.

What TensorFlow gives was recorded with TensorFlow 2.21 (decode_image, resize with method "area", crop_to_bounding_box,
in the order of big_vision's "decode|resize_small(256)|central_crop(224)"), as a CRC-32 of the pixels.
"""

import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvit_engine.config import EvalTransform
from fastvit_engine.data.pixels.crops import eval_view, render
from fastvit_engine.data.pixels.decode import PixelBuffer, open_image
from fastvit_engine.data.pixels.resample import pillow_bicubic, tensorflow_area
from fastvit_engine.data.pixels.views import decode_views
from tests.in_full import IN_FULL
from tests.kernels.integrations.conftest import TORCHVISION  # lets timm be imported

pytest.importorskip("timm", reason="timm is not installed")
from timm.data.transforms_factory import transforms_imagenet_eval

assert TORCHVISION is None or TORCHVISION.ns == "torchvision"


def _picture(height: int, width: int, number: int = 0) -> np.ndarray:
    """Sharp patterns, from integers alone."""
    row, column = np.mgrid[0:height, 0:width].astype(np.int64)
    planes = (
        row * row * 7 + column * 13 + number * 31,
        row * 5 ^ column * 11,
        row * column + column * column * 3 + number,
    )
    return np.stack([plane % 256 for plane in planes], axis=-1).astype(np.uint8)


def _evaluated(data: bytes, size: int, eval_crop: float, transform: EvalTransform) -> np.ndarray:
    image = open_image(data)
    view = eval_view(image.height, image.width, size, eval_crop, transform)
    decoded = decode_views(image, [view], PixelBuffer())
    out = np.full((size, size, 3), 77, np.uint8)
    render(decoded, view, out, PixelBuffer())
    return out


def _with_timm(data: bytes, size: int, eval_crop: float) -> np.ndarray:
    transform = transforms_imagenet_eval(size, crop_pct=eval_crop, interpolation="bicubic", normalize=False)
    return transform(Image.open(io.BytesIO(data)).convert("RGB")).permute(1, 2, 0).numpy()


def _photos(real_data: Path) -> Iterator[bytes]:
    """Every fifth of 300 photos of all sizes."""
    folder = real_data / "imagenet-sample"
    if not folder.is_dir():
        pytest.skip(f"no real shards at {folder}")
    number = 0
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    if number % 5 == 0:
                        yield tar.extractfile(member).read()
                    number += 1


# ---- timm


@settings(max_examples=60 if IN_FULL else 20, deadline=None)
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    size=st.sampled_from([16, 32, 37, 224]),
    eval_crop=st.one_of(st.sampled_from([0.875, 0.9, 0.95, 0.96, 1.0]), st.floats(0.5, 1.0)),
    format=st.sampled_from(["PNG", "JPEG"]),
    mode=st.sampled_from(["RGB", "L", "CMYK", "1", "P", "RGBA", "LA"]),
    orientation=st.integers(1, 8),
)
def test_timm_gives_the_pixels_of_timm(height, width, size, eval_crop, format, mode, orientation):
    if max(height, width) > 50 * min(height, width):  # megabytes, when resized
        height = width
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x112] = orientation  # which both ignore
    lacks = {"JPEG": ("P", "RGBA", "LA"), "PNG": ("CMYK",)}[format]
    picture = Image.fromarray(_picture(height, width)).convert("RGB" if mode in lacks else mode)
    transparent = {"transparency": 3} if picture.mode == "P" else {}
    picture.save(buffer, format, exif=exif, **transparent)
    data = buffer.getvalue()
    assert np.array_equal(_evaluated(data, size, eval_crop, "timm"), _with_timm(data, size, eval_crop))


def test_timm_gives_the_pixels_of_timm_on_photos(real_data):
    for data in _photos(real_data):
        assert np.array_equal(_evaluated(data, 224, 0.875, "timm"), _with_timm(data, 224, 0.875))


def test_timm_rounds_as_torchvision_does():
    # 224 / 0.9 is 248.9; 500 x 248 / 375 is 330.7, and the margins of 53 and 12 columns are halved to the even number.
    view = eval_view(500, 375, 224, 0.9, "timm")
    assert (view.resized, view.corner) == ((330, 248), (53, 12))
    assert eval_view(375, 501, 224, 0.875, "timm").resized == (256, 342)
    assert eval_view(400, 503, 224, 0.875, "timm").corner == (16, 48)  # margins of 32 and 97


def test_an_image_that_would_be_enormous_when_resized_is_refused():
    with pytest.raises(ValueError, match="would be 2560000 x 256 pixels when resized for evaluation, more than 178,95"):
        pillow_bicubic(
            np.zeros((1, 10000, 3), np.uint8), (256, 2560000), 16, 1279888, np.empty((224, 224, 3), np.uint8)
        )


# ---- big_vision


@pytest.mark.parametrize(
    ("height", "width", "number", "small", "large"),
    [
        (1, 1, 0, 0xF5A0F415, 0xD2D5321F),
        (3, 500, 1, 0x6417F0E4, 0xA36FBE8C),
        (500, 3, 2, 0x783298E5, 0x9D2A5FC9),
        (33, 40, 4, 0xCE4B514D, 0x7F7EA993),
        (375, 500, 12, 0x0CD8B699, 0x24F02C8E),
        (1000, 333, 14, 0x960E7D99, 0x004F47F4),
    ],
)
def test_big_vision_gives_the_pixels_of_tensorflow(encode, height, width, number, small, large):
    data = encode(_picture(height, width, number), "PNG")
    assert zlib.crc32(_evaluated(data, 16, 0.875, "big_vision")) == small
    assert zlib.crc32(_evaluated(data, 224, 0.875, "big_vision")) == large


def test_big_vision_gives_the_pixels_of_tensorflow_on_photos(real_data):
    checksum = 0
    for data in _photos(real_data):
        checksum = zlib.crc32(_evaluated(data, 224, 0.875, "big_vision"), checksum)
    assert checksum == 0x457D040A


def _mean_matrix(length: int, resized: int) -> np.ndarray:
    """float64 [resized, length]: the share of each pixel in each resized one, from their overlap."""
    edges = np.linspace(0, length, resized + 1)
    low, high = edges[:-1, None], edges[1:, None]
    pixel = np.arange(length)
    return (np.minimum(high, pixel + 1) - np.maximum(low, pixel)).clip(0) / (high - low)


@settings(max_examples=60 if IN_FULL else 20, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), resized=st.tuples(st.integers(8, 90), st.integers(8, 90)))
def test_area_is_the_mean_of_the_rectangle_rounded_down(height, width, resized):
    pixels, size = _picture(height, width), 8
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    out = np.full((size, size, 3), 77, np.uint8)
    tensorflow_area(pixels, resized, top, left, out)
    rows, columns = _mean_matrix(height, resized[0]), _mean_matrix(width, resized[1])
    mean = np.einsum("yh,xw,hwc->yxc", rows, columns, pixels.astype(np.float64), optimize=True)
    mean = mean[top : top + size, left : left + size]
    error = 0.01  # of sums in float32
    assert (np.floor(mean - error) <= out).all() and (out <= np.floor(mean + error)).all()
