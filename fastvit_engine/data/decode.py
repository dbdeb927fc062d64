"""Encoded image bytes to RGB pixels, and WebDataset samples to (pixels, label)."""

import io

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from fastvit_engine.config import DataConfig
from fastvit_engine.data.stream import Sample
from fastvit_engine.errors import UserError

MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs
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

    def decode(self, buffer: PixelBuffer, reduction: int = 1) -> np.ndarray:
        """uint8 RGB [ceil(height / reduction), ceil(width / reduction), 3], in `buffer`; reduction is 1, 2, 4 or 8.

        Damaged data decodes as far as it goes, as in the usual ImageNet pipelines. ValueError where nothing does.
        """
        height, width = -(-self.height // reduction), -(-self.width // reduction)
        try:
            return simplejpeg.decode_jpeg(
                self.data,
                "RGB",
                min_height=height,
                min_width=width,
                min_factor=reduction,
                buffer=buffer.reserve(height, width),
                strict=False,
            )
        except ValueError:  # what libjpeg-turbo gives up on Pillow may still read
            return _open_with_pillow(self.data).decode(buffer, reduction)


class OtherImage:
    """An image that Pillow decodes."""

    def __init__(self, image: Image.Image) -> None:
        self.image, self.height, self.width = image, image.height, image.width

    def decode(self, buffer: PixelBuffer, reduction: int = 1) -> np.ndarray:
        """As Jpeg.decode."""
        try:
            pixels = _rgb(self.image)
        except Exception as error:  # Pillow's decoders raise many kinds, all meaning the same here
            raise ValueError(str(error) or type(error).__name__) from error
        return np.asarray(Image.fromarray(pixels).reduce(reduction)) if reduction > 1 else pixels


def open_image(data: bytes) -> Jpeg | OtherImage:
    """Reads the header of a JPEG, PNG or WebP; ValueError where there is none."""
    if data[:2] == b"\xff\xd8":
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
            if colorspace not in ("CMYK", "YCCK") and height * width <= MAX_PIXELS:
                return Jpeg(data, height, width)
        except (ValueError, KeyError):
            pass  # rare chroma subsamplings, which Pillow knows; it also refuses what is no image at all
    return _open_with_pillow(data)


def decode_image(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] RGB of a JPEG, PNG or WebP; ValueError where nothing decodes.

    Transparency is dropped, EXIF orientation ignored.
    """
    return open_image(data).decode(PixelBuffer())


def _open_with_pillow(data: bytes) -> OtherImage:
    try:
        return OtherImage(Image.open(io.BytesIO(data)))
    except UnidentifiedImageError as error:
        raise ValueError("not an image") from error
    except Exception as error:  # as above
        raise ValueError(str(error) or type(error).__name__) from error


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's conversion would clip, not scale
        gray = (np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


def decode_sample(sample: Sample, data: DataConfig, num_classes: int) -> tuple[np.ndarray, int]:
    """(uint8 [H, W, 3], label) of a sample; UserError naming shard and key where a member is missing or wrong."""
    where = f"sample '{sample['__key__']}' of shard {sample['__url__']}"
    members = [name for name in sample if not name.startswith("__")]
    image_name = next((name for name in data.image_key.split(";") if name in sample), None)
    if image_name is None or data.label_key not in sample:
        missing = data.image_key if image_name is None else data.label_key
        raise UserError(
            f"{where} has no '{missing}' member, only {members}: set data.image_key and data.label_key to the "
            "shards' extensions, or make the shards again with the members of a sample next to each other"
        )
    text = sample[data.label_key][:100]
    try:
        label = int(text)
    except ValueError:
        raise UserError(
            f"{where} has the label {text!r} in '{data.label_key}', which is not a class index: "
            "correct the shard or set data.label_key to the member that holds it"
        ) from None
    if not 0 <= label < num_classes:
        raise UserError(
            f"{where} has label {label}, outside 0..{num_classes - 1}: correct the shard or raise model.num_classes"
        )
    try:
        return decode_image(sample[image_name]), label
    except ValueError as error:
        raise UserError(
            f"{where} has an image in '{image_name}' that cannot be decoded ({error}): "
            "replace it or make the shard again without it"
        ) from error
