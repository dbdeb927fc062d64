import io

import numpy as np
import pytest
from PIL import Image, features

from fastvit_engine.data.build.encode import encode_for_shard
from fastvit_engine.data.pixels.decode import decode_image
from fastvit_engine.data.shards.image_files import IMAGE_SUFFIXES, has_image_suffix

TAKEN = """jpg jpeg jpe jfif png apng webp bmp dib gif tif tiff ppm pgm pbm pnm
           jp2 j2k jpx avif tga qoi mpo pcx ras"""
OTHERS = "a.txt a.pdf a.eps a.mpg a.hdf a.psd a.ico a.svg a.pfm a.npy a ppm .tar a.jpg.txt"


@pytest.mark.parametrize("suffix", TAKEN.split())
def test_suffixes_of_photos_are_taken_in_any_case(suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    assert f".{suffix}" in IMAGE_SUFFIXES and has_image_suffix(f"a.b.{suffix.upper()}")


@pytest.mark.parametrize("name", OTHERS.split())
def test_other_suffixes_are_not(name):
    assert not has_image_suffix(name)


def test_the_usual_formats_come_first():
    assert IMAGE_SUFFIXES[:4] == (".jpg", ".jpeg", ".png", ".webp") and len(set(IMAGE_SUFFIXES)) == len(IMAGE_SUFFIXES)


@pytest.mark.parametrize("suffix", [s for s in IMAGE_SUFFIXES if Image.registered_extensions()[s] in Image.SAVE])
def test_what_is_taken_can_be_trained_on(suffix):
    """Whatever Pillow writes with this suffix becomes a member that training decodes to the pixels Pillow reads."""
    pixels = np.linspace(0, 255, 24 * 16 * 3).astype(np.uint8).reshape(24, 16, 3)
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    format = Image.registered_extensions()[suffix]
    try:
        image.save(buffer, format)
    except OSError:  # a codec that this Pillow lacks
        pytest.skip(f"this Pillow does not write {format}")
    extension, data = encode_for_shard(buffer.getvalue())
    assert extension in ("jpg", "png", "webp")
    assert np.array_equal(decode_image(data), np.asarray(Image.open(buffer).convert("RGB")))
