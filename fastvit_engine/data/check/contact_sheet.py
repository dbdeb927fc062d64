"""Sheets of images to look at: what shards hold, and what a recipe's augmentation makes of it."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fastvit_engine.config import Config
from fastvit_engine.data.pixels.crops import draw_crops, render, train_view
from fastvit_engine.data.pixels.decode import Decoded, PixelBuffer, decode_image, if_decodes
from fastvit_engine.data.pixels.draws import sample_seeds
from fastvit_engine.data.pixels.randaugment import randaugment
from fastvit_engine.data.pixels.views import (
    choose_views,
    distort_views,
    draw_views,
    images_shape,
    render_views,
    training_views,
    unpack_views,
)
from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.data.shards.names import ShardSet, Split, shard_set
from fastvit_engine.data.shards.remote_path import AnyPath, new_file
from fastvit_engine.data.shards.usable import PLAUSIBLE_CLASSES, SampleKeys, judge
from fastvit_engine.errors import UserError
from fastvit_engine.packed_image import read_packed
from fastvit_engine.shown import public_url

_SCALE = 2  # pixels per unit, for sharp text on today's screens; all lengths below are in units
_CELL, _GAP, _MARGIN = 112, 12, 32  # 28 and 32 pixels fill a cell exactly
_CAPTION, _TITLE = 20, 34  # heights
_PAPER, _TILE, _INK, _SOFT = "#ffffff", "#f2f1ee", "#1b1d21", "#62666e"
_SHARDS, _SAMPLES_A_SHARD = 8, 100  # that images are chosen from


class UsableImage(NamedTuple):
    """An image that training can use, and its label."""

    label: int  # -1: none that is usable
    content: bytes
    max_pixels: int  # that it was checked for
    probability: float | None  # of that label, if it is a teacher's and soft

    def pixels(self) -> np.ndarray:
        return decode_image(self.content, self.max_pixels)


class Tile(NamedTuple):
    """One picture of a sheet."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    caption: str = ""


def class_sheet(
    argument: str, config: Config | None = None, *, split: Split | None = None, width: int = 8, rows: int = 5
) -> Image.Image:
    """Images of as many classes as there is room for, in the order of the classes, with their names.

    Images and labels are read with the keys of `config` (or the defaults); samples without a usable image are left out.
    Raises UserError if there is no other.
    """
    shards = shard_set(argument, split)
    by_class: dict[int, list[UsableImage]] = {}
    for found in _some_samples(shards, config or Config()):
        of_class = by_class.setdefault(found.label, [])
        if len(of_class) < rows:
            of_class.append(found)
    if not by_class:
        raise UserError(f"the shards of {argument} hold no usable images: see what `fastvit data verify` says of them")
    chosen: list[list[UsableImage | None]]
    if 2 <= len(by_class) <= 10:  # a column for each class
        columns = [by_class[label] for label in sorted(by_class)]
        chosen = [[of_class[row] if row < len(of_class) else None for of_class in columns] for row in range(rows)]
        chosen = [row for row in chosen if any(row)]
    else:
        labels = _evenly(sorted(by_class), width * rows)
        of_each = max(1, width * rows // len(labels))
        row_by_row = [found for label in labels for found in by_class[label][:of_each]][: width * rows]
        chosen = [list(row_by_row[start : start + width]) for start in range(0, len(row_by_row), width)]
    grid = [[found and Tile(found.pixels(), _caption(shards, found)) for found in row] for row in chosen]
    names = shards.class_names or by_class
    return draw_sheet(
        grid, title=Path(public_url(argument)).name or public_url(argument), note=f"{len(names):,} classes"
    )


def augmented_sheet(config: Config, *, rows: int = 6, draws: int = 8) -> Image.Image:
    """Originals of data.train or its first source, one per row, each beside `draws` of what training makes of it."""
    if rows < 1 or draws < 1:
        raise UserError("--rows and --draws must be at least 1: give more")
    if not config.data.sources:
        raise UserError("data.train is not set: add --set data.train=SHARDS")
    source = config.data.sources[0].shards  # of a mixture, the first
    shards = shard_set(source, "train")
    grid: list[list[Tile | None]] = []
    for row, found in enumerate(islice(_some_samples(shards, config, each=1), rows)):
        pixels = found.pixels()
        if len(training_views(config)) > 1:
            augmented = _views(pixels, config, sample_seeds(config.seed, row, 0))
        else:
            augmented = [*_augmented(pixels, config, sample_seeds(config.seed, row, np.arange(draws)))]
        grid.append([Tile(pixels, _caption(shards, found)), *map(Tile, augmented)])
    if not grid:
        raise UserError(f"the shards of {source} hold no usable images: see what `fastvit data verify` says of them")
    size = config.model.image_size
    limit = "" if config.packing.max_patches is None else f", up to {config.packing.max_patches} patches"
    made = f"{draws} draws at {size} px{limit}" if len(training_views(config)) == 1 else "the views of one draw"
    return draw_sheet(grid, title=config.name, note=f"original, and {made}", set_apart=True)


def _views(pixels: np.ndarray, config: Config, seeds: np.ndarray) -> list[np.ndarray]:
    """uint8 [S, S, 3] each: the views that training with a seed (int64 [1]) compares of one image."""
    views = training_views(config)
    chosen = choose_views(pixels.shape[0], pixels.shape[1], views, draw_views(seeds, views)[0])
    out = np.empty((1, *images_shape(views)), np.uint8)
    render_views(Decoded(pixels), chosen, [view.size for view in views], out[0], PixelBuffer())
    return [view[0].numpy() for view in distort_views(unpack_views(torch.from_numpy(out), views), views, seeds)]


def _augmented(pixels: np.ndarray, config: Config, seeds: np.ndarray) -> Sequence[np.ndarray]:
    """uint8 [S, S, 3] each: what training makes of one image with each seed, except for mixing it with others."""
    if config.packing.on:
        return _packed(pixels, config, seeds)
    return list(_squares(pixels, config, seeds))


def _squares(pixels: np.ndarray, config: Config, seeds: np.ndarray) -> np.ndarray:
    """The same for squares, uint8 [B, S, S, 3]."""
    size, augment = config.model.image_size, config.augment
    images = np.empty((len(seeds), size, size, 3), np.uint8)
    for image, draws in zip(images, draw_crops(seeds, config.augment.crop), strict=True):
        view = train_view(pixels.shape[0], pixels.shape[1], size, augment, draws)
        render(Decoded(pixels), view, image, PixelBuffer())
    if not augment.randaugment_ops:
        return images
    return randaugment(
        torch.from_numpy(images),
        seeds,
        num_ops=augment.randaugment_ops,
        magnitude=augment.randaugment_magnitude,
        policy=augment.randaugment_policy,
    ).numpy()


def _packed(pixels: np.ndarray, config: Config, seeds: np.ndarray) -> list[np.ndarray]:
    """As `_augmented`, at proportions of their own."""
    views, augment = training_views(config), config.augment
    found = []
    for seed, draws in zip(seeds, draw_views(seeds, views), strict=True):
        out = np.empty(images_shape(views), np.uint8)
        chosen = choose_views(pixels.shape[0], pixels.shape[1], views, draws)
        render_views(Decoded(pixels), chosen, [], out, PixelBuffer())
        image = read_packed(out)
        if augment.randaugment_ops:
            image = randaugment(
                torch.from_numpy(image)[None],
                seed[None],
                num_ops=augment.randaugment_ops,
                magnitude=augment.randaugment_magnitude,
                policy=augment.randaugment_policy,
            ).numpy()[0]
        found.append(image)
    return found


def draw_sheet(
    grid: Sequence[Sequence[Tile | None]], *, title: str, note: str = "", set_apart: bool = False
) -> Image.Image:
    """Rows of tiles of one size: whole images, centred, with one line of caption under each row that has captions.

    `set_apart` leaves room after the first column.
    """
    columns = max(len(row) for row in grid)
    captions = [any(tile is not None and tile.caption for tile in row) for row in grid]
    apart = 2 * _GAP if set_apart else 0
    width = 2 * _MARGIN + columns * _CELL + (columns - 1) * _GAP + apart
    height = 2 * _MARGIN + _TITLE + sum(_CELL + (_CAPTION if has else 0) + _GAP for has in captions) - _GAP
    sheet = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, title, (_MARGIN, _MARGIN), 17, _INK, width - 2 * _MARGIN)
    taken = _font(17).getlength(_shorten(title, 17, width - 2 * _MARGIN)) / _SCALE
    _write(draw, note, (_MARGIN + taken + 10, _MARGIN + 4), 12, _SOFT, width - 2 * _MARGIN - taken - 10)
    top = _MARGIN + _TITLE
    for row, has_caption in zip(grid, captions, strict=True):
        for column, tile in enumerate(row):
            left = _MARGIN + column * (_CELL + _GAP) + (apart if column else 0)
            if tile is not None:
                _paste(sheet, tile.pixels, left, top)
                _write(draw, tile.caption, (left, top + _CELL + 4), 11, _SOFT, _CELL)
        top += _CELL + (_CAPTION if has_caption else 0) + _GAP
    return sheet


def save_sheet(sheet: Image.Image, path: AnyPath, *, option: str = "--sheet") -> None:
    """Writes a PNG file, whole or not at all. Raises UserError, which tells to change `option`, if it cannot be."""
    try:
        with new_file(path) as file:
            sheet.save(file, "PNG", optimize=True)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): choose another {option}") from error


def _some_samples(shards: ShardSet, config: Config, each: int = _SAMPLES_A_SHARD) -> Iterator[UsableImage]:
    """The first `each` samples of evenly spaced shards, then the next ones, up to a hundred of each shard."""
    keys = SampleKeys.of(config.data)
    num_classes = len(shards.class_names) if shards.class_names is not None else PLAUSIBLE_CLASSES
    present = [shard for shard in shards.shards if shard not in shards.missing]
    shown = [islice(read_shard(shard), _SAMPLES_A_SHARD) for shard in _evenly(present, _SHARDS)]
    while shown:
        for samples in list(shown):
            some = list(islice(samples, each))
            if not some:
                shown.remove(samples)
            for sample in some:
                judged = judge(sample, keys, num_classes, partial(if_decodes, max_pixels=keys.max_pixels))
                if judged.image is not None:
                    label = judged.labels[0] if judged.labels else -1
                    soft = judged.soft if label >= 0 else None
                    probability = None if soft is None else float(soft.dense(max(soft.num_classes, label + 1))[label])
                    yield UsableImage(label, judged.image, keys.max_pixels, probability)


def _evenly(values: list[Any], wanted: int) -> list[Any]:
    """At most `wanted` of them, evenly spaced."""
    if len(values) <= wanted:
        return list(values)
    return [values[index * len(values) // wanted] for index in range(wanted)]


def _caption(shards: ShardSet, image: UsableImage) -> str:
    name = _name(shards, image.label)
    return name if image.probability is None else f"{100 * image.probability:.0f} % {name}"


def _name(shards: ShardSet, label: int) -> str:
    names = shards.class_names
    if label < 0:
        return "no label"
    return names[label] if names is not None and label < len(names) else f"class {label}"


def _paste(sheet: Image.Image, pixels: np.ndarray, left: int, top: int) -> None:
    """The whole image, as large as fits into the cell, on a tile; small ones in whole multiples, pixel by pixel."""
    side = _CELL * _SCALE
    height, width = pixels.shape[:2]
    factor = side / max(height, width)
    resample = Image.Resampling.LANCZOS
    if factor >= 2:
        factor, resample = int(factor), Image.Resampling.NEAREST
    size = max(1, round(width * factor)), max(1, round(height * factor))
    image = Image.fromarray(pixels).resize(size, resample)
    box = left * _SCALE, top * _SCALE
    sheet.paste(_TILE, (*box, box[0] + side, box[1] + side))
    sheet.paste(image, (box[0] + (side - size[0]) // 2, box[1] + (side - size[1]) // 2))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * _SCALE)


def _write(
    draw: ImageDraw.ImageDraw, text: str, corner: tuple[float, float], size: int, colour: str, width: float
) -> None:
    position = (corner[0] * _SCALE, corner[1] * _SCALE)
    draw.text(position, _shorten(text, size, width), fill=colour, font=_font(size))


def _shorten(text: str, size: int, width: float) -> str:
    font = _font(size)
    if font.getlength(text) <= width * _SCALE:
        return text
    while text and font.getlength(text + "…") > width * _SCALE:
        text = text[:-1]
    return text + "…" if text else ""
