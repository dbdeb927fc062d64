import io

import numpy as np
import pytest
from PIL import Image

from fastvit_engine.data.build.encode import encode_for_shard, encode_jpeg
from fastvit_engine.data.pixels.decode import PixelBuffer, decode_image, open_image
from fastvit_engine.data.pixels.jpeg_part import Box


def _smooth(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / 17) * np.cos(columns / 23), np.cos(rows / 11), np.sin(columns / 13 + rows / 31)]
    return np.stack([127 + 120 * wave for wave in waves], axis=-1).astype(np.uint8)


def _save(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("format", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize("resize", [None, 30, 1000])
def test_bytes_pass_untouched(encode, format, extension, resize):
    data = encode(_smooth(40, 30), format)
    assert encode_for_shard(data, resize) == (extension, data)


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(900, 600, (96, 64)), (130, 1300, (64, 640)), (65, 65, (64, 64))]
)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_resize_is_the_exact_one_of_the_pixels(encode, height, width, expected, format):
    image = (
        _smooth(height, width) // 8 + _smooth(height, width)[..., :1] // 2
    )  # little colour: JPEG halves its resolution
    data = encode(image, format, **({"quality": 95} if format == "JPEG" else {}))
    extension, small = encode_for_shard(data, 64, 95)
    pixels = decode_image(small)
    assert extension == "jpg" and small[:2] == b"\xff\xd8" and pixels.shape == (*expected, 3)
    exact = Image.fromarray(image).resize(expected[::-1], Image.Resampling.BICUBIC)
    assert np.abs(pixels.astype(int) - np.asarray(exact)).mean() < 3


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_resized_images_have_restart_markers_and_huffman_codes_of_their_own(encode, mode):
    """Which change no pixel."""
    image = Image.fromarray(_smooth(512, 700)).convert(mode)
    data = encode_for_shard(_save(image, "PNG"), 256)[1]
    assert data.count(b"\xff\xdd\x00\x04") == 1 and all(data.count(bytes([0xFF, 0xD0 + n])) >= 8 for n in range(8))
    pixels = decode_image(data)
    whole = decode_image(_save(image.resize((350, 256), Image.Resampling.BICUBIC), "JPEG", quality=90))
    assert np.array_equal(pixels, whole)
    decoded = open_image(data).decode_box(Box(100, 200, 20, 30), PixelBuffer())
    assert decoded.pixels.shape[0] <= 64 and np.array_equal(
        decoded.cut(Box(100, 200, 20, 30)), pixels[100:120, 200:230]
    )


def test_noise_is_encoded_too(capfd):
    """Pillow has too little memory for it if codes are optimised."""
    noise = (np.random.default_rng(0).integers(0, 2, (300, 400, 3)) * 255).astype(np.uint8)
    with pytest.raises(OSError):
        _save(Image.fromarray(noise), "JPEG", quality=94, optimize=True)
    data = encode_jpeg(Image.fromarray(noise), 94)
    assert np.array_equal(decode_image(data), decode_image(_save(Image.fromarray(noise), "JPEG", quality=94)))
    assert b"\xff\xdd\x00\x04" in data


def test_modes():
    image = Image.fromarray(_smooth(80, 60))
    gray = encode_for_shard(_save(image.convert("L"), "PNG"), 30)[1]
    assert Image.open(io.BytesIO(gray)).mode == "L"
    for changed, format in (
        (image.convert("CMYK"), "JPEG"),
        (image.quantize(64), "PNG"),
        (image.convert("RGBA"), "PNG"),
    ):
        data = _save(changed, format)
        small = decode_image(encode_for_shard(data, 30)[1])
        assert small.shape == (40, 30, 3)
        assert np.abs(small.astype(int) - np.asarray(image.resize((30, 40)))).mean() < 12
    deep = np.linspace(0, 65535, 80 * 60).astype(np.uint16).reshape(80, 60)
    small = decode_image(encode_for_shard(_save(Image.fromarray(deep), "PNG"), 30)[1])
    assert small[-2:].mean() > 245 and 120 < small.mean() < 135  # scaled, not clipped


@pytest.mark.parametrize("format", ["BMP", "GIF", "TIFF"])
def test_other_formats_become_png(format):
    image = Image.fromarray(_smooth(20, 30)).quantize(64)
    extension, data = encode_for_shard(_save(image if format == "GIF" else image.convert("RGB"), format))
    assert extension == "png" and np.array_equal(decode_image(data), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("resize", [None, 16])
def test_floating_point_pixels_are_refused_as_their_range_is_unknown(resize):
    data = _save(Image.fromarray(np.linspace(0, 1, 24 * 24, dtype=np.float32).reshape(24, 24)), "TIFF")
    with pytest.raises(ValueError, match="cannot be decoded .pixels are floating-point numbers of unknown range"):
        encode_for_shard(data, resize)


@pytest.mark.parametrize("resize", [None, 16])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "cannot be decoded"),
        (lambda data: b"", "is not an image"),
        (lambda data: b"<html></html>", "is not an image"),
        (lambda data: data[:3], "is not an image"),
        (lambda data: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "which is not run"),
    ],
)
def test_what_is_no_whole_image_is_refused(encode, damage, message, resize):
    for format in ("JPEG", "PNG"):
        with pytest.raises(ValueError, match=message):
            encode_for_shard(damage(encode(_smooth(200, 100), format)), resize)


@pytest.mark.parametrize("resize", [None, 16])
def test_an_image_has_at_most_so_many_pixels(encode, resize):
    for format in ("JPEG", "PNG"):
        data = encode(_smooth(200, 100), format)
        assert encode_for_shard(data, resize, max_pixels=20_000)
        with pytest.raises(ValueError, match="it has 20,000 pixels, more than the 19,999 of data.max_pixels"):
            encode_for_shard(data, resize, max_pixels=19_999)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF"])
def test_a_border_is_cut_off_and_the_rest_is_lossless(format):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    data = buffer.getvalue()
    for border in (1, 2, 4):
        extension, encoded = encode_for_shard(data, border=border)
        whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert extension == "png"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded))), whole[border:-border, border:-border])
    extension, encoded = encode_for_shard(data, resize=4, border=2)
    assert extension == "jpg" and Image.open(io.BytesIO(encoded)).size == (6, 4)
    with pytest.raises(ValueError, match="it has 12 x 9 pixels, all of them of its border"):
        encode_for_shard(data, border=5)
