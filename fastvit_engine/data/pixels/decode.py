"""Encoded image bytes to RGB pixels."""

import io
import re
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from fastvit_engine.config import DataConfig

# How accurately a JPEG is decoded. accurate: as Pillow, bit for bit; tensorflow: as TensorFlow's default, with the fast
# DCT; fast: with the fast DCT and plain upsampling of the colours, 42 dB from accurate and 30 at worst.
Decoding = Literal["accurate", "tensorflow", "fast"]
MAX_PIXELS = DataConfig().max_pixels
_OTHER_FRAMES = frozenset(range(0xC1, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of progressive and other JPEGs
_LARGEST_KEPT = 1 << 26  # bytes of a PixelBuffer


class PixelBuffer:
    """Memory for one image after another: new memory for each would cost a page fault every 4 kB."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def reserve(self, height: int, width: int) -> np.ndarray:
        """uint8 [height, width, 3] with any content; valid until the next call."""
        size = height * width * 3
        if size > _LARGEST_KEPT:
            return np.empty((height, width, 3), np.uint8)
        if size > len(self._memory):
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size].reshape(height, width, 3)


class Jpeg:
    """A JPEG that libjpeg-turbo turns into RGB, of which the header has been read."""

    def __init__(self, data: bytes, height: int, width: int) -> None:
        self.data, self.height, self.width = data, height, width

    def decode(
        self, buffer: PixelBuffer, reduction: int = 1, *, decoding: Decoding = "accurate", rows: int | None = None
    ) -> np.ndarray:
        """uint8 RGB [ceil(height / reduction), ceil(width / reduction), 3], in `buffer`; reduction is 1, 2, 4 or 8.

        `rows`: those of the image from the top on that are needed; what is below them may be missing, and costs less.
        Damaged data decodes as far as it goes, as in the usual ImageNet pipelines. Raises ValueError if nothing does.
        """
        data, height = (self.data, self.height) if rows is None else _cut(self.data, self.height, rows)
        height, width = -(-height // reduction), -(-self.width // reduction)
        try:
            return simplejpeg.decode_jpeg(
                data,
                "RGB",
                min_height=height,
                min_width=width,
                min_factor=reduction,
                fastdct=decoding != "accurate",
                fastupsample=decoding == "fast",
                buffer=buffer.reserve(height, width),
                strict=False,
            )
        except ValueError:  # what libjpeg-turbo gives up on Pillow may still read
            other = _open_with_pillow(self.data, self.height * self.width)
            if (other.height, other.width) != (self.height, self.width):
                raise ValueError("its header gives two sizes") from None
            return other.decode(buffer, reduction)


class OtherImage:
    """An image that Pillow decodes."""

    def __init__(self, image: Image.Image) -> None:
        self.image, self.height, self.width = image, image.height, image.width

    def decode(
        self, buffer: PixelBuffer, reduction: int = 1, *, decoding: Decoding = "accurate", rows: int | None = None
    ) -> np.ndarray:
        """As Jpeg.decode, but into memory of its own, never less than accurate and always whole."""
        try:
            pixels = _rgb(self.image)
        except Exception as error:  # Pillow's decoders raise many kinds, all meaning the same here
            raise ValueError(str(error) or type(error).__name__) from error
        return np.asarray(Image.fromarray(pixels).reduce(reduction)) if reduction > 1 else pixels


def _cut(data: bytes, height: int, rows: int) -> tuple[bytes | bytearray, int]:
    """A JPEG and its height, cut off below the given rows if that can be done; the rows stay as they were.

    In a baseline JPEG with one scan, blocks follow one another from top to bottom: a decoder that is told of fewer rows
    stops there. One row of blocks more than asked for, because chroma is interpolated between rows.
    """
    try:
        at = 2
        while data[at + 1] != 0xC0:  # the frame header of a baseline JPEG
            if data[at] != 0xFF or data[at + 1] in _OTHER_FRAMES:
                return data, height
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        frame, components = at, data[at + 9]
        block = 8 * max(factors & 15 for factors in data[at + 11 : at + 11 + 3 * components : 3])
        while data[at + 1] != 0xDA:  # the header of the first scan
            if data[at] != 0xFF:
                return data, height
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        one_scan = data[at + 4] == components and int.from_bytes(data[frame + 5 : frame + 7], "big") == height
    except (IndexError, ValueError):  # damaged
        return data, height
    needed = (-(-rows // block) + 1) * block
    if not one_scan or needed >= height:
        return data, height
    shorter = bytearray(data)
    shorter[frame + 5 : frame + 7] = needed.to_bytes(2, "big")
    return shorter, needed


def check_pixels(count: int, most: int) -> None:
    """Raises ValueError if an image has more pixels than `most`, data.max_pixels."""
    if count > most:
        raise ValueError(f"it has {count:,} pixels, more than the {most:,} of data.max_pixels")


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Jpeg | OtherImage:
    """Reads the header of an image. Raises ValueError if there is none, or if it announces more than `max_pixels`."""
    image = _open(data, max_pixels)
    check_pixels(image.height * image.width, max_pixels)
    return image


def _open(data: bytes, max_pixels: int) -> Jpeg | OtherImage:
    if data[:2] == b"\xff\xd8":
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
            if colorspace not in ("CMYK", "YCCK"):
                return Jpeg(data, height, width)
        except (ValueError, KeyError):
            pass  # rare chroma subsamplings, which Pillow knows; it also refuses what is no image at all
    return _open_with_pillow(data, max_pixels)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [H, W, 3] RGB of an encoded image. Raises ValueError if nothing decodes, or for more than `max_pixels`.

    Transparency is dropped, EXIF orientation ignored.
    """
    return open_image(data, max_pixels).decode(PixelBuffer())


def if_decodes(data: bytes, max_pixels: int = MAX_PIXELS) -> bytes:
    """`data`. Raises ValueError if training could not decode it."""
    decode_image(data, max_pixels)
    return data


def open_safely(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Pillow's image, of which the header is read. Raises ValueError for one that must not be decoded.

    Raises what Pillow raises for what it cannot open.
    """
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:  # above twice Pillow's own limit, whatever ours is
        count = re.search(r"\((\d+) pixels\)", str(error))
        check_pixels(int(count[1]) if count else max_pixels + 1, max_pixels)
        raise
    if image.format == "EPS":
        raise ValueError("it is a PostScript program, which is not run")
    check_pixels(image.width * image.height, max_pixels)
    return image


def _open_with_pillow(data: bytes, max_pixels: int = MAX_PIXELS) -> OtherImage:
    try:
        return OtherImage(open_safely(data, max_pixels))
    except UnidentifiedImageError as error:
        raise ValueError("not an image") from error
    except Exception as error:  # as above
        raise ValueError(str(error) or type(error).__name__) from error


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's conversion would clip, not scale
        gray = (np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))
