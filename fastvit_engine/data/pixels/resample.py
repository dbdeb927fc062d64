"""The ways in which timm and big_vision resize images before evaluation, with the same results to the bit."""

import numpy as np
from PIL import Image

from fastvit_engine.data.pixels.decode import MAX_PIXELS


def pillow_bicubic(pixels: np.ndarray, resized: tuple[int, int], top: int, left: int, out: np.ndarray) -> None:
    """Writes to `out` the rectangle at (top, left) of an image resized by Pillow's antialiased bicubic filter.

    pixels: uint8 [H, W, 3]. resized: height and width of the whole image afterwards. out: uint8 [S, T, 3]. Raises
    ValueError if the resized image would have more pixels than an image may have: that of an extremely long one.
    """
    height, width = resized
    if height * width > MAX_PIXELS:
        raise ValueError(f"would be {width} x {height} pixels when resized for evaluation, more than {MAX_PIXELS:,}")
    whole = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    out[:] = np.asarray(whole.crop((left, top, left + out.shape[1], top + out.shape[0])))


def tensorflow_area(pixels: np.ndarray, resized: tuple[int, int], top: int, left: int, out: np.ndarray) -> None:
    """As `pillow_bicubic`, by TensorFlow's area method: the mean of the rectangle that becomes a pixel, rounded down.

    Repeats the float32 operations of TensorFlow's kernel in their order: rounding down shows the last bit of a sum,
    also in an area of one colour. Computes the rectangle alone, so that the resized image may be of any size.
    """
    rows, row_weights, row_scale = _area_taps(pixels.shape[0], resized[0], top, len(out))
    columns, column_weights, column_scale = _area_taps(pixels.shape[1], resized[1], left, out.shape[1])
    first = rows.min()
    needed = pixels[first : rows.max() + 1]
    across = needed[:, columns[0]] * column_weights[0][:, None]  # float32 [rows, T, 3]
    for index, weight in zip(columns[1:], column_weights[1:], strict=True):
        across += needed[:, index] * weight[:, None]
    total = across[rows[0] - first] * row_weights[0][:, None, None]  # float32 [S, T, 3]
    for index, weight in zip(rows[1:], row_weights[1:], strict=True):
        total += across[index - first] * weight[:, None, None]
    total *= np.float32(1 / np.float64(row_scale * column_scale))
    out[:] = total.clip(0, 255)  # which cuts off the fraction


def _area_taps(length: int, resized: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Which of `length` pixels each of `count` resized ones covers, from `first` on, and how much of them.

    Returns their indices (int64 [taps, count]), their weights (float32, likewise; 0 fills up) and the scale.
    """
    scale = np.float32(length) / np.float32(resized)
    numbers = np.arange(first, first + count)
    begin, end = numbers.astype(np.float32) * scale, (numbers + 1).astype(np.float32) * scale
    start, stop = np.floor(begin).astype(np.int64), np.ceil(end).astype(np.int64)
    index = start + np.arange((stop - start).max())[:, None]
    low, high = index.astype(np.float32), (index + 1).astype(np.float32)
    weight = np.where(
        low < begin,
        np.where(high > end, scale, high - begin),
        np.where(high > end, end - low, np.float32(1)),
    )
    weight[index >= stop] = 0
    return index.clip(0, length - 1), weight, scale
