"""Pixels to training and evaluation crops of the model's size, all uint8 on the CPU."""

import math

import cv2
import numpy as np

from fastvit_engine.config import DataConfig

_CROP_TRIES = 10

# Decoding processes are the parallelism, and OpenCV deadlocks in a process forked after its thread pool has started.
cv2.setNumThreads(1)


def train_transform(image: np.ndarray, image_size: int, data: DataConfig, generator: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [image_size, image_size, 3]: the crop of data.crop, resized, mirrored with odds 1/2."""
    if data.crop == "inception":
        top, left, height, width = inception_crop(
            image.shape[0], image.shape[1], data.crop_scale, data.crop_ratio, generator
        )
        image = image[top : top + height, left : left + width]
    image = _resize(image, image_size, image_size)
    if data.flip and generator.random() < 0.5:
        image = np.ascontiguousarray(image[:, ::-1])
    return image


def eval_transform(image: np.ndarray, image_size: int, eval_crop: float) -> np.ndarray:
    """uint8 [H, W, 3]: short side to image_size / eval_crop, then the centre [image_size, image_size, 3]."""
    short = max(image_size, round(image_size / eval_crop))
    scale = short / min(image.shape[:2])
    height, width = (max(short, round(side * scale)) for side in image.shape[:2])
    image = _resize(image, height, width)
    top, left = (height - image_size) // 2, (width - image_size) // 2
    return image[top : top + image_size, left : left + image_size]


def inception_crop(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop with a random share of the area and a log-uniform aspect ratio.

    Szegedy et al. 2015 (arXiv:1409.4842), section 6. Shapes that do not fit are drawn again; after ten tries the
    largest centred crop within the range of aspect ratios is taken.
    """
    low, high = (math.log(bound) for bound in ratio)
    for _ in range(_CROP_TRIES):
        area = generator.uniform(*scale) * height * width
        aspect = math.exp(generator.uniform(low, high))  # width / height
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(generator.integers(height - crop_height + 1))
            left = int(generator.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width = min(width, max(1, round(height * ratio[1])))
    crop_height = min(height, max(1, round(width / ratio[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
