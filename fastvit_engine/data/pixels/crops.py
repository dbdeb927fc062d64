"""From decoded pixels to training and evaluation crops of the model's size, all uint8 on the CPU."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import cv2
import numpy as np

from fastvit_engine.config import AugmentConfig, CropKind, EvalTransform
from fastvit_engine.data.pixels.decode import Decoded, Decoding, PixelBuffer
from fastvit_engine.data.pixels.draws import uniforms
from fastvit_engine.data.pixels.jpeg_part import Box
from fastvit_engine.data.pixels.resample import pillow_bicubic, tensorflow_area

_CROP_TRIES = 10
_TENSORFLOW_TRIES = 100
# Mirrored or not, and four numbers per try. Those of one kind are the first ones of another.
_DRAWS = {"inception": 1 + 4 * _CROP_TRIES, "tensorflow": 1 + 4 * _TENSORFLOW_TRIES, "resize": 1}
_STREAM = 2000  # of `uniforms`

# Decoding processes are the parallelism, and OpenCV deadlocks in a process forked after its thread pool has started.
cv2.setNumThreads(1)


class Grid(NamedTuple):
    """Whole patches that an image is resized to."""

    rows: int
    columns: int
    patch_size: int  # pixels

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width."""
        return self.rows * self.patch_size, self.columns * self.patch_size


class View(NamedTuple):
    """What of an image the model sees: a box of it is resized, the centre of that cut out, and perhaps mirrored."""

    top: int
    left: int
    height: int
    width: int
    resized: tuple[int, int]  # (height, width) of the whole box then, at least the model's image size
    mirrored: bool = False
    decoding: Decoding = "accurate"
    resampling: Literal["bilinear", "pillow_bicubic", "tensorflow_area"] = "bilinear"  # which is not antialiased
    corner: tuple[int, int] | None = None  # (top, left) of what is cut out of the resized box; None: its centre
    grid: Grid | None = None  # the size of what is cut out, at the image's own proportions; None: a square

    @property
    def box(self) -> Box:
        return Box(self.top, self.left, self.height, self.width)

    @property
    def reduction(self) -> int:
        """How many times smaller the image may be decoded (1, 2, 4 or 8) without enlarging the box afterwards."""
        if self.resampling != "bilinear" or self.decoding == "tensorflow":
            return 1
        factor = min(self.height / self.resized[0], self.width / self.resized[1])
        return next((reduction for reduction in (8, 4, 2) if factor >= reduction), 1)


def draw_crops(seeds: np.ndarray, crop: CropKind = "inception") -> list[list[float]]:
    """The random numbers, in [0, 1), that `train_view` needs for each sample of a batch, from its seed (int64 [B])."""
    return uniforms(seeds, _DRAWS[crop], stream=_STREAM).tolist()


def train_view(height: int, width: int, image_size: int, augment: AugmentConfig, draws: Sequence[float]) -> View:
    """The crop of augment.crop, mirrored with odds 1/2 if augment.flip is on."""
    decoding: Decoding = "fast"
    if augment.crop == "inception":
        box = inception_crop(height, width, augment.crop_scale, augment.crop_ratio, draws[1:])
    elif augment.crop == "tensorflow":
        box = tensorflow_crop(height, width, augment.crop_scale, augment.crop_ratio, draws[1:])
        decoding = "tensorflow"
    else:
        box = (0, 0, height, width)
    return View(*box, resized=(image_size, image_size), mirrored=augment.flip and draws[0] < 0.5, decoding=decoding)


def eval_view(height: int, width: int, image_size: int, eval_crop: float, transform: EvalTransform) -> View:
    """The whole image with its short side resized to image_size / eval_crop, to be cut to its centre.

    timm: as timm's evaluation transform for "bicubic", of torchvision's Resize and CenterCrop. big_vision: as its
    "decode|resize_small(256)|central_crop(224)", with the sizes of this model. fast: bilinear without antialiasing, of
    an image that is decoded smaller. They differ in how they resize and in how they round.
    """
    if transform == "timm":
        short = math.floor(image_size / eval_crop)
        resized = (int(short * height / width), short) if width <= height else (short, int(short * width / height))
        corner = (round((resized[0] - image_size) / 2), round((resized[1] - image_size) / 2))  # halves to even
        return View(0, 0, height, width, resized, resampling="pillow_bicubic", corner=corner)
    if transform == "big_vision":
        factor = np.float32(math.floor(image_size / eval_crop)) / np.float32(min(height, width))
        resized = (int(np.rint(np.float32(height) * factor)), int(np.rint(np.float32(width) * factor)))
        return View(0, 0, height, width, resized, decoding="tensorflow", resampling="tensorflow_area")
    short = max(image_size, round(image_size / eval_crop))
    scale = short / min(height, width)
    return View(0, 0, height, width, resized=(max(short, round(height * scale)), max(short, round(width * scale))))


def inception_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draws: Sequence[float]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop with a random share of the area and a log-uniform aspect ratio.

    Szegedy et al. 2015 (arXiv:1409.4842), section 6. Shapes that do not fit are drawn again; after ten tries the
    largest centred crop within the range of aspect ratios is taken. `draws`: 40 numbers in [0, 1).
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(0, 4 * _CROP_TRIES, 4):
        area = (scale[0] + (scale[1] - scale[0]) * draws[i]) * height * width
        aspect = math.exp(low + (high - low) * draws[i + 1])  # width / height
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(draws[i + 2] * (height - crop_height + 1))
            left = int(draws[i + 3] * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width = min(width, max(1, round(height * ratio[1])))
    crop_height = min(height, max(1, round(width / ratio[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def tensorflow_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draws: Sequence[float]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop as tf.image.sample_distorted_bounding_box draws it without boxes.

    What that does: the aspect ratio is uniform, and then the height, between those of the smallest and the largest area
    that fit. So small crops are rarer than in `inception_crop`. Shapes that do not fit are drawn again; after 100 tries
    the whole image is taken. The last row and column of places are never drawn. `draws`: 400 numbers in [0, 1).
    """
    smallest, largest = (share * height * width for share in scale)
    for i in range(0, 4 * _TENSORFLOW_TRIES, 4):
        aspect = ratio[0] + (ratio[1] - ratio[0]) * draws[i]  # width / height
        low, high = round(math.sqrt(smallest / aspect)), round(math.sqrt(largest / aspect))
        if round(high * aspect) > width:
            high = int((width + 0.5 - 1e-7) / aspect)
            high -= round(high * aspect) > width
        high = min(high, height)
        low = min(low, high)
        crop_height = low + int(draws[i + 1] * (high - low + 1))
        for change in (1, -1):  # areas that rounding has put out of range
            area = crop_height * round(crop_height * aspect)
            if (area < smallest) if change > 0 else (area > largest):
                crop_height += change
        crop_width = round(crop_height * aspect)
        fits = 0 < crop_width <= width and 0 < crop_height <= height
        if fits and smallest <= crop_height * crop_width <= largest:
            top = int(draws[i + 2] * max(height - crop_height, 1))
            left = int(draws[i + 3] * max(width - crop_width, 1))
            return top, left, crop_height, crop_width
    return 0, 0, height, width


def render(decoded: Decoded, view: View, out: np.ndarray, scratch: PixelBuffer) -> None:
    """Writes the view of an image, of which at least its box was decoded, to `out`, uint8 [S, T, 3]."""
    box = decoded.cut(view.box)
    height, width = view.resized
    rows, columns = out.shape[:2]
    top, left = view.corner or ((height - rows) // 2, (width - columns) // 2)
    if view.resampling != "bilinear":
        resize = pillow_bicubic if view.resampling == "pillow_bicubic" else tensorflow_area
        resize(box, view.resized, top, left, out)
        return
    if (height, width) == (rows, columns):
        cv2.resize(box, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)
    else:
        whole = scratch.reserve(height, width)
        cv2.resize(box, (width, height), dst=whole, interpolation=cv2.INTER_LINEAR)
        out[:] = whole[top : top + rows, left : left + columns]
    if view.mirrored:
        cv2.flip(out, 1, dst=out)
