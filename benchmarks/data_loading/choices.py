"""What decoders and ways to resize cost: the choices behind `decode` and `augment`."""

import io
from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.nn.functional import interpolate

from benchmarks.data_loading.variants import CROP_RATIO, CROP_SCALE
from fastvit_engine.data.pixels.crops import inception_crop
from fastvit_engine.data.pixels.decode import PixelBuffer, open_image
from fastvit_engine.data.pixels.draws import uniforms


class Choice(NamedTuple):
    """The cost of one way to decode or resize, and its distance from accurate decoding."""

    dataset: str
    stage: str  # decode or resize
    name: str
    chosen: bool
    seconds: float  # CPU, an image
    psnr: tuple[float, float] | None  # dB against accurate decoding: mean and lowest over the images that differ


def _decoders() -> dict[str, Callable[[bytes], Any]]:
    buffer = PixelBuffer()
    space = np.empty(1 << 27, np.uint8)

    def turbo(**options: bool) -> Callable[[bytes], Any]:
        return lambda data: simplejpeg.decode_jpeg(data, "RGB", strict=False, buffer=space, **options)

    return {
        "simplejpeg, fast DCT and upsampling (training)": lambda data: open_image(data).decode(buffer, decoding="fast"),
        "simplejpeg, accurate (evaluation)": lambda data: open_image(data).decode(buffer),
        "simplejpeg, fast DCT": turbo(fastdct=True),
        "simplejpeg, fast upsampling": turbo(fastupsample=True),
        "simplejpeg, accurate, into new memory": lambda data: simplejpeg.decode_jpeg(data, "RGB", strict=False),
        "OpenCV": lambda data: cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        ),
        "Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
    }


def _resizers(size: int) -> dict[str, Callable[[np.ndarray], Any]]:
    out = np.empty((size, size, 3), np.uint8)

    def opencv(method: int) -> Callable[[np.ndarray], Any]:
        return lambda box: cv2.resize(box, (size, size), dst=out, interpolation=method)

    def with_torch(box: np.ndarray) -> Any:
        planes = torch.from_numpy(box).permute(2, 0, 1)[None]
        return interpolate(planes, (size, size), mode="bilinear", antialias=True)

    return {
        "OpenCV bilinear": opencv(cv2.INTER_LINEAR),
        "the same, mirrored by OpenCV": lambda box: cv2.flip(opencv(cv2.INTER_LINEAR)(box), 1, dst=out),
        "the same, mirrored by NumPy": lambda box: np.ascontiguousarray(opencv(cv2.INTER_LINEAR)(box)[:, ::-1]),
        "OpenCV bicubic": opencv(cv2.INTER_CUBIC),
        "OpenCV area": opencv(cv2.INTER_AREA),
        "PyTorch bilinear, antialiased": with_torch,
        "Pillow bilinear, antialiased": lambda box: np.asarray(
            Image.fromarray(box).resize((size, size), Image.Resampling.BILINEAR)
        ),
    }


def measure_choices(dataset: str, photos: list[bytes], size: int, rounds: int) -> list[Choice]:
    """Every choice on the same JPEG files, and on the same crops of them, in turns."""
    pixels = [simplejpeg.decode_jpeg(data, "RGB", strict=False) for data in photos]
    draws = uniforms(np.arange(len(photos)), 40, stream=0).tolist()
    boxes = []
    for image, numbers in zip(pixels, draws, strict=True):
        top, left, height, width = inception_crop(image.shape[0], image.shape[1], CROP_SCALE, CROP_RATIO, numbers)
        boxes.append(image[top : top + height, left : left + width])
    decoders, resizers = _decoders(), _resizers(size)
    seconds = _in_turns(decoders, photos, rounds) | _in_turns(resizers, boxes, rounds)
    choices = []
    for name, decode in decoders.items():
        quality = _psnr([decode(data).copy() for data in photos], pixels)
        choices.append(Choice(dataset, "decode", name, name in list(decoders)[:2], seconds[name], quality))
    for name in resizers:
        chosen = name in list(resizers)[:2]
        choices.append(Choice(dataset, "resize", name, chosen, seconds[name], None))
    return choices


def _in_turns(functions: dict[str, Callable[[Any], Any]], values: list[Any], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = process_time()
            for value in values:
                function(value)
            times[name].append((process_time() - start) / len(values))
    return {name: median(seconds) for name, seconds in times.items()}


def _psnr(images: list[np.ndarray], accurate: list[np.ndarray]) -> tuple[float, float] | None:
    errors = [float(((a.astype(np.int32) - b) ** 2).mean()) for a, b in zip(images, accurate, strict=True)]
    ratios = [10 * float(np.log10(255**2 / error)) for error in errors if error]
    return (sum(ratios) / len(ratios), min(ratios)) if ratios else None
