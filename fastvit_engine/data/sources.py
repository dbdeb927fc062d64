"""Where `fastvit data make` takes images from."""

import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastvit_engine.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class SourceImage(NamedTuple):
    """An encoded image that is read only when its turn comes."""

    key: str
    extension: str  # without the dot, lower case
    label: int  # index into the class names
    content: Path | bytes

    def read(self) -> bytes:
        """The encoded bytes; UserError naming the file where it is unreadable or not a whole image."""
        name = self.content if isinstance(self.content, Path) else self.key
        try:
            data = self.content.read_bytes() if isinstance(self.content, Path) else self.content
            with Image.open(io.BytesIO(data)) as image:
                image.load()  # Pillow, unlike the training decoder, refuses truncated JPEGs
        except UnidentifiedImageError as error:
            raise UserError(f"image {name} is not an image: repair or remove it and run again") from error
        except Exception as error:  # Pillow's decoders raise many kinds, all meaning the same here
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"image {name} cannot be read ({reason}): repair or remove it and run again") from error
        return data


class Source(NamedTuple):
    classes: list[str]
    images: list[SourceImage]  # in a fixed order


def open_source(name: str) -> Source:
    """`digits`, or the path of a folder with one sub-folder of images a class."""
    return digits() if name == "digits" else image_folder(Path(name))


def image_folder(path: Path) -> Source:
    """Images below path/<class>/, classes and files in sorted order; other files are left out.

    UserError where there is no such folder, or a class has no image.
    """
    if not path.is_dir():
        raise UserError(f"there is no folder {path}: give a folder with one sub-folder of images a class, or 'digits'")
    try:
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not folders:
            raise UserError(f"folder {path} has no sub-folders: put the images of each class into a folder of its own")
        images: list[SourceImage] = []
        for label, folder in enumerate(folders):
            files = sorted(file for file in folder.rglob("*") if _is_image(file))
            if not files:
                raise UserError(
                    f"class folder {folder} holds no image ({', '.join(IMAGE_SUFFIXES)}): fill it or remove it"
                )
            for file in files:
                # A key must have no dot, be unique and fit into a tar header; the number alone makes it unique.
                key = f"{len(images):08d}_{re.sub(r'[^A-Za-z0-9_-]+', '_', file.stem)[:60]}"
                images.append(SourceImage(key, file.suffix[1:].lower(), label, file))
    except OSError as error:
        raise UserError(f"folder {error.filename} cannot be read ({error.strerror}): make it readable") from error
    return Source([folder.name for folder in folders], images)


def digits() -> Source:
    """The 1,797 handwritten digits of scikit-learn as 8x8 RGB PNGs, 0..16 scaled to 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the source 'digits' comes with scikit-learn: pip install scikit-learn") from error
    scans, labels = load_digits(return_X_y=True)
    pixels = np.rint(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
    images = [
        SourceImage(f"digit_{index:04d}", "png", int(label), _png(scan))
        for index, (scan, label) in enumerate(zip(pixels, labels, strict=True))
    ]
    return Source([str(digit) for digit in range(10)], images)


def _png(gray: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(gray).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
