"""Any bytes for an image are pixels or refused in one sentence, in bounded time and memory."""

import io

import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from fastvit_engine.data.pixels.decode import MAX_PIXELS, decode_image
from tests.fastvit_engine.fuzzing import fuzz, mutated, read_or_refuse

pytestmark = pytest.mark.timeout(3600)


def _image(format: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = np.arange(16 * 17 * 3, dtype=np.uint8).reshape(16, 17, 3)
    Image.fromarray(pixels).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


IMAGES = [_image("JPEG"), _image("JPEG", progressive=True), _image("JPEG", "CMYK"), _image("PNG"), _image("PNG", "P")]
IMAGES += [_image("GIF"), _image("WEBP"), _image("BMP"), _image("TIFF"), _image("TIFF", compression="tiff_lzw")]
IMAGES += [_image("PPM"), _image("ICO"), _image("JPEG2000")]
WORDS = [b"\xff\xd8", b"\xff\xc0", b"\xff\xda", b"\xff\xff\xff\x7f", b"IHDR", b"IDAT", b"zTXt", b"99999 99999\n"]


@fuzz
@given(content=mutated(IMAGES, WORDS))
def test_images(content: bytes) -> None:
    memory = 12 * MAX_PIXELS  # of a header that announces the largest image, in Pillow and as an array
    pixels = read_or_refuse(lambda: decode_image(content), ValueError, memory=memory)
    assert pixels is None or (pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3)
