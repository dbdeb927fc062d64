"""Encodes an image of any format for a shard."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastvit_engine.data.pixels.decode import MAX_PIXELS, open_safely
from fastvit_engine.data.pixels.jpeg_part import restart_interval

_PASSED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's format -> extension in a shard
_DRAFT = 2  # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is still this many times the target


def encode_for_shard(
    data: bytes, resize: int | None = None, quality: int = 90, max_pixels: int = MAX_PIXELS, border: int = 0
) -> tuple[str, bytes]:
    """Returns (extension, bytes). Raises ValueError if the data is not an image, is cut short, or above `max_pixels`.

    JPEG, PNG and WebP stay as they are; other formats become PNG. With `resize`, an image whose short side is longer
    than that is scaled down to it (bicubic, antialiased) and becomes a JPEG of `quality`. A `border` of so many pixels
    is cut off first; what is left is never passed on as it is.
    """
    try:
        with open_safely(data, max_pixels) as image:
            width, height = (side - 2 * border for side in image.size)
            if width < 1 or height < 1:
                raise ValueError(f"it has {image.width} x {image.height} pixels, all of them of its border")
            scale = resize / min(width, height) if resize is not None else 1.0
            inner = border, border, border + width, border + height
            if scale >= 1 and border:
                return "png", _save(_eight_bits(image).crop(inner), "PNG")
            if scale >= 1:
                image.load()  # Pillow, unlike the training decoder, refuses truncated JPEGs
                if image.format in _PASSED:
                    return _PASSED[image.format], data
                return "png", _save(_eight_bits(image), "PNG")
            size = max(1, round(width * scale)), max(1, round(height * scale))
            if border:
                whole = _eight_bits(image).crop(inner)
            else:
                image.draft(None, (size[0] * _DRAFT, size[1] * _DRAFT))
                whole = _eight_bits(image)
            small = whole.resize(size, Image.Resampling.BICUBIC)
            return "jpg", encode_jpeg(small, quality)
    except UnidentifiedImageError as error:
        raise ValueError("is not an image") from error
    except Exception as error:  # Pillow's decoders raise many kinds, all meaning the same here
        raise ValueError(f"cannot be decoded ({error or type(error).__name__})") from error


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """A JPEG of a gray or RGB image, of which training can decode a crop alone: restart markers tell its parts apart.

    They cost 2 to 3 % of the bytes. Huffman codes of its own, which change no pixel either, save as much.
    """
    markers = restart_interval(image.width, gray=image.mode == "L")
    try:
        return _save(image, "JPEG", quality=quality, restart_marker_blocks=markers, optimize=True)
    except OSError:  # Pillow has memory for a byte per pixel then, which pure noise exceeds
        return _save(image, "JPEG", quality=quality, restart_marker_blocks=markers)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Converts to gray or RGB like the training decoder: transparency dropped, 16 bits scaled to 8."""
    image.load()
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.copy() if image.mode == "L" else image.convert("RGB")


def _save(image: Image.Image, format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
