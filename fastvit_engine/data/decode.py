"""Encoded image bytes to RGB pixels, and WebDataset samples to pixels and label."""

import io
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from fastvit_engine.config import DataConfig
from fastvit_engine.data.labels import label_member, parse_labels
from fastvit_engine.errors import UserError

Sample = dict[str, Any]  # "__key__", "__url__", and the bytes of each member by its lower-case extension

MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs


def decode_image(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] RGB of a JPEG, PNG or WebP. Transparency is dropped, EXIF orientation ignored.

    Damaged JPEG data decodes as far as it goes, as in the usual ImageNet pipelines. ValueError where nothing decodes.
    """
    if data[:2] == b"\xff\xd8":
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
            if colorspace not in ("CMYK", "YCCK") and height * width <= MAX_PIXELS:
                return simplejpeg.decode_jpeg(data, "RGB", strict=False)
        except (ValueError, KeyError):
            pass  # rare chroma subsamplings, which Pillow knows; it also refuses what is no image at all
    return _decode_with_pillow(data)


def _decode_with_pillow(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's conversion would clip, not scale
                gray = (np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)
                return np.repeat(gray[:, :, None], 3, axis=2)
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError("not an image") from error
    except Exception as error:  # Pillow's decoders raise many kinds, all meaning the same here
        raise ValueError(str(error) or type(error).__name__) from error


class CorruptSample(Exception):
    """A sample without a usable image; the message is the reason: "has ..."."""


def read_label(sample: Sample, data: DataConfig, num_classes: int) -> int:
    """The class index of a sample; UserError naming shard and key where it has none or one out of range."""
    where = f"sample '{sample['__key__']}' of shard {sample['__url__']}"
    member, path = label_member(data.label_key)
    if member not in sample:
        raise UserError(f"{where} has no '{member}' member, only {_members(sample)}: correct it or set data.label_key")
    content = sample[member]
    try:
        labels = parse_labels(content, path)
    except ValueError:
        raise UserError(
            f"{where} has the label {content[:100]!r} in '{data.label_key}', which is not a class index: "
            "correct the shard or set data.label_key to the member that holds it"
        ) from None
    if len(labels) != 1:
        raise UserError(
            f"{where} has {len(labels)} labels in '{data.label_key}', and training takes one: "
            "correct the shard or set data.label_key"
        )
    if not 0 <= labels[0] < num_classes:
        raise UserError(
            f"{where} has label {labels[0]}, outside 0..{num_classes - 1}: correct the shard or raise model.num_classes"
        )
    return labels[0]


def read_image(sample: Sample, data: DataConfig) -> np.ndarray:
    """uint8 [H, W, 3] of a sample; CorruptSample where it has no image or one that cannot be decoded."""
    name = next((name for name in data.image_key.split(";") if name in sample), None)
    if name is None:
        raise CorruptSample(f"has no '{data.image_key}' member, only {_members(sample)}")
    try:
        return decode_image(sample[name])
    except ValueError as error:
        raise CorruptSample(f"has an image in '{name}' that cannot be decoded ({error})") from error


def _members(sample: Sample) -> list[str]:
    return [name for name in sample if not name.startswith("__")]
