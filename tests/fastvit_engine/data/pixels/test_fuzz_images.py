"""Any bytes for an image are pixels or refused in one sentence, in bounded time and memory."""

import io

import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from fastvit_engine.data.pixels.decode import MAX_PIXELS, PixelBuffer, decode_image, open_image
from fastvit_engine.data.pixels.jpeg_part import Box
from tests.fastvit_engine.fuzzing import fuzz, mutated, read_or_refuse

pytestmark = pytest.mark.timeout(3600)


def _image(format: str, mode: str = "RGB", size: tuple[int, int] = (16, 17), **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = np.arange(size[0] * size[1] * 3).astype(np.uint8).reshape(*size, 3)
    Image.fromarray(pixels).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


IMAGES = [_image("JPEG"), _image("JPEG", progressive=True), _image("JPEG", "CMYK"), _image("PNG"), _image("PNG", "P")]
IMAGES += [_image("GIF"), _image("WEBP"), _image("BMP"), _image("TIFF"), _image("TIFF", compression="tiff_lzw")]
JPEGS = [
    _image("JPEG", size=(40, 70), **markers)
    for markers in ({"restart_marker_blocks": 1}, {"restart_marker_rows": 1}, {})
]
JPEGS += IMAGES[1:3]
IMAGES += [_image("PPM"), _image("ICO"), _image("JPEG2000")]
WORDS = [b"\xff\xd8", b"\xff\xc0", b"\xff\xda", b"\xff\xff\xff\x7f", b"IHDR", b"IDAT", b"zTXt", b"99999 99999\n"]


@fuzz
@given(content=mutated(IMAGES, WORDS))
def test_images(content: bytes) -> None:
    memory = 12 * MAX_PIXELS  # of a header that announces the largest image, in Pillow and as an array
    pixels = read_or_refuse(lambda: decode_image(content), ValueError, memory=memory)
    assert pixels is None or (pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3)


@fuzz
@given(content=mutated(JPEGS, [*WORDS, b"\xff\xdd\x00\x04", b"\xff\xd0", b"\xff\xd9"]))
def test_a_box_of_a_jpeg(content: bytes) -> None:
    """Is that of the whole, or refused as the whole is."""

    def corner() -> np.ndarray:
        image = open_image(content)
        box = Box(image.height // 2, image.width // 2, max(1, image.height // 4), max(1, image.width // 4))
        whole = image.decode(PixelBuffer())[box.top : box.bottom, box.left : box.right]
        part = open_image(content).decode_box(box, PixelBuffer()).cut(box)
        assert np.array_equal(part, whole)
        return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastvit_engine.data.pixels.jpeg_part.WORTH", 1)  # so small images are worth it
        read_or_refuse(corner, ValueError, memory=24 * MAX_PIXELS)
