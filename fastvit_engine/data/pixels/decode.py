"""Encoded image bytes to RGB pixels."""

import io
import re
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from fastvit_engine.config import DataConfig
from fastvit_engine.data.pixels.jpeg_part import Box, Part, cut_out, whole_part

# How accurately a JPEG is decoded. accurate: as Pillow, bit for bit; tensorflow: as TensorFlow's default, with the fast
# DCT; fast: with the fast DCT and plain upsampling of the colours, 42 dB from accurate and 30 at worst.
Decoding = Literal["accurate", "tensorflow", "fast"]
MAX_PIXELS = DataConfig().max_pixels
_LARGEST_KEPT = 1 << 26  # bytes of a PixelBuffer
_UNTOUCHED = bytes([201, 3, 90, 254, 17, 140, 66, 229, 5, 178, 31, 112])  # instead of the last pixels, until they come


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


class Decoded(NamedTuple):
    """Pixels of an image that was decoded `reduction` times smaller, at least those of the box that was asked for."""

    pixels: np.ndarray  # uint8 RGB [H, W, 3]
    top: int = 0  # where they begin in all of the image, as small as it was decoded
    left: int = 0
    reduction: int = 1

    def cut(self, box: Box) -> np.ndarray:
        """The pixels of a box of the image, of its full size, as uint8 [ceil(height / reduction) or 1 more, ...]."""
        top, left = box.top // self.reduction - self.top, box.left // self.reduction - self.left
        bottom, right = -(-box.bottom // self.reduction) - self.top, -(-box.right // self.reduction) - self.left
        return self.pixels[top:bottom, left:right]


Decode = Callable[[PixelBuffer], Decoded]  # a step that is left to do


class Jpeg:
    """A JPEG that libjpeg-turbo turns into RGB, of which the header has been read."""

    def __init__(self, data: bytes, height: int, width: int, colorspace: str = "YCbCr") -> None:
        """colorspace: as simplejpeg names it."""
        self.data, self.height, self.width, self.colorspace = data, height, width, colorspace

    def decode(self, buffer: PixelBuffer, reduction: int = 1, *, decoding: Decoding = "accurate") -> np.ndarray:
        """uint8 RGB [ceil(height / reduction), ceil(width / reduction), 3], in `buffer`; reduction is 1, 2, 4 or 8.

        Damaged data decodes as far as it goes, as in the usual ImageNet pipelines. Raises ValueError if nothing does.
        """
        try:
            return _with_turbo(self.data, self.height, self.width, buffer, reduction, decoding)
        except ValueError:
            return self._with_pillow().decode(buffer, reduction)

    def decode_box(
        self, box: Box, buffer: PixelBuffer, reduction: int = 1, *, decoding: Decoding = "accurate"
    ) -> Decoded:
        """As `decode`, to the bit, but only a part of the image that has the box: as little as can be told apart."""
        return self.cut(box, reduction, decoding=decoding)(buffer)

    def cut(self, box: Box, reduction: int = 1, *, decoding: Decoding = "accurate") -> Decode:
        """The first step of `decode_box`; what it returns does the rest."""
        margin = 0 if decoding == "fast" else 2 * reduction  # pixels to interpolate colours of half the resolution from
        part = cut_out(self.data, self.height, self.width, box, margin)
        return partial(self._decode_part, part, reduction, decoding)

    def _decode_part(self, part: Part, reduction: int, decoding: Decoding, buffer: PixelBuffer) -> Decoded:
        data, box = part
        try:
            pixels = _with_turbo(data, box.height, box.width, buffer, reduction, decoding)
        except ValueError:  # damage behind the part may end its decoding, and not that of the whole
            return Decoded(self.decode(buffer, reduction, decoding=decoding), reduction=reduction)
        return Decoded(pixels, box.top // reduction, box.left // reduction, reduction)

    def part(self, box: Box, reduction: int) -> Part | None:
        """A JPEG with as little as is needed to decode a box with smooth colours; None if only few decoders take it."""
        if self.colorspace not in ("YCbCr", "Gray"):
            return None
        return whole_part(self.data, self.height, self.width, box, 2 * reduction)

    def _with_pillow(self) -> "OtherImage":
        """What libjpeg-turbo gives up on Pillow may still read."""
        other = _open_with_pillow(self.data, self.height * self.width)
        if (other.height, other.width) != (self.height, self.width):
            raise ValueError("its header gives two sizes")
        return other


class OtherImage:
    """An image that Pillow decodes."""

    def __init__(self, image: Image.Image) -> None:
        self.image, self.height, self.width = image, image.height, image.width

    def decode(self, buffer: PixelBuffer, reduction: int = 1, *, decoding: Decoding = "accurate") -> np.ndarray:
        """As Jpeg.decode, but into memory of its own and never less than accurate."""
        try:
            pixels = _rgb(self.image)
        except Exception as error:  # Pillow's decoders raise many kinds, all meaning the same here
            raise ValueError(str(error) or type(error).__name__) from error
        return np.asarray(Image.fromarray(pixels).reduce(reduction)) if reduction > 1 else pixels

    def decode_box(
        self, box: Box, buffer: PixelBuffer, reduction: int = 1, *, decoding: Decoding = "accurate"
    ) -> Decoded:
        """All of it, see `decode`."""
        return Decoded(self.decode(buffer, reduction, decoding=decoding), reduction=reduction)

    def cut(self, box: Box, reduction: int = 1, *, decoding: Decoding = "accurate") -> Decode:
        """`decode_box`, which has no steps here."""
        return partial(self.decode_box, box, reduction=reduction, decoding=decoding)


def _with_turbo(
    data: bytes | bytearray, height: int, width: int, buffer: PixelBuffer, reduction: int, decoding: Decoding
) -> np.ndarray:
    height, width = -(-height // reduction), -(-width // reduction)
    memory = buffer.reserve(height, width)
    end = memory.data.cast("B")[-len(_UNTOUCHED) :]
    untouched = _UNTOUCHED[-len(end) :]
    end[:] = untouched
    pixels = simplejpeg.decode_jpeg(
        data,
        "RGB",
        min_height=height,
        min_width=width,
        min_factor=reduction,
        fastdct=decoding != "accurate",
        fastupsample=decoding == "fast",
        buffer=memory,
        strict=False,
    )
    if end == untouched:  # not strict is also to be silent if it gave up before the first pixel
        raise ValueError("nothing of it decodes")
    return pixels


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
                return Jpeg(data, height, width, colorspace)
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
