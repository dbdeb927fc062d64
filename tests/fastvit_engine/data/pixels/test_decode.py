import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from fastvit_engine.data.pixels.decode import Jpeg, PixelBuffer, decode_image, if_decodes, open_image


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    rows, columns = np.mgrid[0:24, 0:36]
    return np.stack([rows * 10, columns * 7, (rows + columns) * 4], axis=-1).astype(np.uint8)


def _with_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _save(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_lossless_formats_give_the_pixels(pixels, encode, format):
    decoded = decode_image(encode(pixels, format, lossless=True))
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, pixels)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpeg_is_what_pillow_gives(pixels, encode, options):
    data = encode(pixels, "JPEG", **options)
    assert np.array_equal(decode_image(data), _with_pillow(data))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_and_cmyk_jpeg(pixels, mode):
    data = _save(Image.fromarray(pixels).convert(mode), "JPEG", quality=95)
    decoded = decode_image(data)
    expected = np.asarray(Image.fromarray(pixels).convert(mode).convert("RGB"))
    assert decoded.shape == (24, 36, 3)
    assert np.abs(decoded.astype(int) - expected).mean() < 4


def test_palette_transparent_and_gray_png(pixels):
    image = Image.fromarray(pixels)
    assert decode_image(_save(image.quantize(16), "PNG")).shape == (24, 36, 3)
    transparent = image.copy()
    transparent.putalpha(7)
    assert np.array_equal(decode_image(_save(transparent, "PNG")), pixels)
    assert np.array_equal(decode_image(_save(image.convert("L"), "PNG"))[..., 2], np.asarray(image.convert("L")))


def test_sixteen_bit_png_is_scaled_not_clipped():
    deep = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    decoded = decode_image(_save(Image.fromarray(deep), "PNG"))
    assert np.array_equal(decoded[..., 0], deep // 257) and np.array_equal(decoded[..., 0], decoded[..., 1])


def test_jpeg_with_bytes_after_its_end(pixels, encode):
    data = encode(pixels, "JPEG")
    assert np.array_equal(decode_image(data + b"trailing"), decode_image(data))


@pytest.mark.parametrize("data", [b"", b"\xff\xd8junk", b"<html></html>", b"\x89PNG\r\n\x1a\nxxxx"])
def test_garbage_is_a_value_error(data):
    with pytest.raises(ValueError):
        decode_image(data)


def test_image_bomb_is_refused(pixels, encode):
    data = bytearray(encode(pixels, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"  # 65500 x 65500
    with pytest.raises(ValueError, match="4,290,250,000 pixels, more than the 178,956,970 of data.max_pixels"):
        decode_image(bytes(data))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_an_image_has_at_most_so_many_pixels(encode, format):
    """No more is read than its header: a reader that wants more than the first kilobytes would miss it."""
    data = encode(np.zeros((60, 70, 3), np.uint8), format)
    assert decode_image(data, 4200).shape == (60, 70, 3)
    for function in (decode_image, open_image, if_decodes):
        with pytest.raises(ValueError, match="it has 4,200 pixels, more than the 4,199 of data.max_pixels"):
            function(data, 4199)


def _png_of(width, height):
    """A PNG of a few bytes that announces any size, with no pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [14_000, 30_000, 2**31 - 1])
def test_a_bomb_costs_no_memory(side):
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"it has {side * side:,} pixels, more than the 178,956,970"):
        decode_image(_png_of(side, side))
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_a_jpeg_of_two_sizes_is_refused(encode):
    """One decoder would believe the first frame header, another the second."""
    data = encode(np.zeros((16, 16, 3), np.uint8), "JPEG")
    at = data.index(b"\xff\xc0")
    frame = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
    larger = frame[:5] + (9000).to_bytes(2, "big") * 2 + frame[9:]
    with pytest.raises(ValueError):
        decode_image(data[:at] + frame + larger + data[at + len(frame) :], max_pixels=256)


def test_postscript_is_not_run():
    """Pillow would start Ghostscript, whose program the image is."""
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ValueError, match="it is a PostScript program, which is not run"):
        decode_image(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_decoding_smaller(encode, format, reduction):
    ramp = np.add.outer(np.linspace(0, 120, 301), np.linspace(0, 120, 450)).astype(np.uint8)
    image = open_image(encode(np.repeat(ramp[..., None], 3, axis=2), format))
    assert (image.height, image.width) == (301, 450)
    small = image.decode(PixelBuffer(), reduction)
    assert small.shape == (-(-301 // reduction), -(-450 // reduction), 3)
    expected = ramp[reduction // 2 :: reduction, reduction // 2 :: reduction]
    difference = small[: len(expected), : expected.shape[1], 0].astype(int) - expected
    assert np.abs(difference).max() < 6


def test_fast_decoding_is_near_to_accurate_decoding(photo):
    for number in range(4):
        data = photo(number, height=150, width=200)
        image = open_image(data)
        error = image.decode(PixelBuffer(), decoding="fast").astype(int) - image.decode(PixelBuffer())
        assert error.any() and 10 * np.log10(255**2 / (error**2).mean()) > 35  # dB


def test_every_size_decodes_smaller(encode):
    for height, width in [(1, 1), (7, 9), (16, 17), (33, 8), (100, 3), (225, 224)]:
        image = open_image(encode(np.zeros((height, width, 3), np.uint8), "JPEG"))
        for reduction in (2, 4, 8):
            assert image.decode(PixelBuffer(), reduction).shape == (-(-height // reduction), -(-width // reduction), 3)


def test_buffer_is_reused_and_its_remains_do_not_show(pixels, encode):
    buffer = PixelBuffer()
    large = np.full((200, 300, 3), 255, np.uint8)
    first = open_image(encode(large, "JPEG")).decode(buffer)
    data = encode(pixels, "JPEG")
    second = open_image(data).decode(buffer)
    assert np.shares_memory(first, second) and np.array_equal(second, _with_pillow(data))


@pytest.mark.parametrize("reduction", [1, 2])
def test_a_jpeg_of_which_nothing_decodes_does_not_show_the_image_before(pixels, encode, reduction):
    """As one that ends within the tables of a later scan, where libjpeg-turbo gives up before the first pixel."""
    data, buffer = encode(pixels, "JPEG", progressive=True), PixelBuffer()
    open_image(data).decode(buffer, reduction)
    with pytest.raises(ValueError, match="truncated"):
        open_image(data[: data.rindex(b"\xff\xc4") + 20]).decode(buffer, reduction)


def test_jpeg_that_the_fast_decoder_refuses_goes_to_pillow(pixels, encode, monkeypatch):
    def refuse(*args, **options):
        raise ValueError

    data = encode(pixels, "JPEG")
    image = open_image(data)
    assert isinstance(image, Jpeg)
    monkeypatch.setattr("simplejpeg.decode_jpeg", refuse)
    assert np.array_equal(image.decode(PixelBuffer()), _with_pillow(data))
