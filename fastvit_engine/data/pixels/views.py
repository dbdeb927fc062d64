"""The views of a training image: several for objectives that compare them (multi-crop, Caron et al. 2020)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fastvit_engine.config import AugmentConfig, Config, DinoConfig, MocoConfig
from fastvit_engine.data.pixels.compressed import row_bytes, write_compressed
from fastvit_engine.data.pixels.crops import View, draw_crops, eval_view, render, train_view
from fastvit_engine.data.pixels.decode import Decode, Decoded, Jpeg, OtherImage, PixelBuffer
from fastvit_engine.data.pixels.distort import distort
from fastvit_engine.data.pixels.draws import sample_seeds
from fastvit_engine.data.pixels.jpeg_part import Box
from fastvit_engine.data.pixels.native import Patches, native_eval_view
from fastvit_engine.packed_image import write_packed

Draws = list[list[float]]  # of one sample, for each view


class TrainingView(NamedTuple):
    """How one of the views of an image is cropped."""

    size: int  # pixels of its side
    augment: AugmentConfig
    distorted: bool = False  # the others are as they were cropped
    blur: float = 0.0  # odds of it, see `distort`
    invert: float = 0.0
    patches: Patches | None = None  # how many it has at its own proportions; None: it is a square

    @property
    def numbers(self) -> int:
        return 3 * self.size**2


def training_views(config: Config, image_size: int | None = None) -> tuple[TrainingView, ...]:
    """The views that training makes of an image: one, but for an objective that compares several.

    image_size: of one alone, in pixels; default: model.image_size.
    """
    pretraining = config.pretraining
    if isinstance(pretraining, MocoConfig):
        return _two_views(config, pretraining.crop_scale, blur=pretraining.blur)
    if isinstance(pretraining, DinoConfig):
        blur = pretraining.blur
        augment = config.augment.model_copy(update={"crop_scale": pretraining.local_scale})
        small = TrainingView(pretraining.local_size, augment, distorted=True, blur=0.5 * blur)
        return (*_two_views(config, pretraining.global_scale, blur=blur), *[small] * pretraining.local_views)
    return (TrainingView(image_size or config.model.image_size, config.augment, patches=Patches.of(config)),)


def _two_views(config: Config, scale: tuple[float, float], *, blur: bool) -> tuple[TrainingView, TrainingView]:
    """Of the model's size, distorted as BYOL does (Grill et al. 2020, arXiv:2006.07733, appendix B)."""
    augment = config.augment.model_copy(update={"crop_scale": scale})
    first, second = (
        TrainingView(config.model.image_size, augment, distorted=True, blur=odds * blur, invert=invert)
        for odds, invert in ((1.0, 0.0), (0.1, 0.2))
    )
    return first, second


def view_seeds(seeds: np.ndarray, number: int, count: int) -> np.ndarray:
    """int64 [B]: what is random about one of `count` views of samples with these seeds. A single view has their own."""
    return seeds if count == 1 else sample_seeds(number, seeds)


def draw_views(seeds: np.ndarray, views: Sequence[TrainingView]) -> list[Draws]:
    """The random numbers that `choose_views` needs for each sample of a batch, from its seed (int64 [B])."""
    drawn = [draw_crops(view_seeds(seeds, number, len(views)), view.augment.crop) for number, view in enumerate(views)]
    if (patches := views[0].patches) is not None:  # the only one; its count comes last
        drawn = [[[*of_crop, count] for of_crop, count in zip(drawn[0], patches.draw(seeds), strict=True)]]
    return [list(of_sample) for of_sample in zip(*drawn, strict=True)]


def choose_views(height: int, width: int, views: Sequence[TrainingView], draws: Draws) -> list[View]:
    """A crop of an image for each of the views."""
    chosen = [
        train_view(height, width, view.size, view.augment, of_view) for view, of_view in zip(views, draws, strict=True)
    ]
    if (patches := views[0].patches) is not None:
        return [patches.fit(chosen[0], patches.count(draws[0][-1]))]
    return chosen


def eval_views(config: Config) -> Callable[[int, int], list[View]]:
    """What evaluation sees of an image, given its height and width."""
    crop, transform, patches = config.data.eval_crop, config.data.eval_transform, Patches.of(config)
    if patches is None:
        choose = partial(eval_view, image_size=config.model.image_size, eval_crop=crop, transform=transform)
    else:
        choose = partial(native_eval_view, patches=patches, eval_crop=crop, transform=transform)
    return lambda height, width: [choose(height, width)]


def decode_views(image: Jpeg | OtherImage, chosen: Sequence[View], buffer: PixelBuffer) -> Decoded:
    """Decodes what these crops of an image need, once for all of them, and as small as all of them allow."""
    return cut_views(image, chosen)(buffer)


def cut_views(image: Jpeg | OtherImage, chosen: Sequence[View]) -> Decode:
    """The first step of `decode_views`; what it returns does the rest."""
    box, reduction, decoding = chosen[0].box, chosen[0].reduction, chosen[0].decoding
    for view in chosen[1:]:
        top, left = min(box.top, view.top), min(box.left, view.left)
        bottom, right = max(box.bottom, view.box.bottom), max(box.right, view.box.right)
        box, reduction = Box(top, left, bottom - top, right - left), min(reduction, view.reduction)
    return image.cut(box, reduction, decoding=decoding)


def render_views(
    decoded: Decoded, chosen: Sequence[View], sizes: Sequence[int], out: np.ndarray, scratch: PixelBuffer
) -> None:
    """Writes crops with sides of `sizes` to `out`, uint8 of `images_shape`; see `render`.

    One at its own proportions is written as `packed_image` has it.
    """
    if (grid := chosen[0].grid) is not None:
        image = np.empty((*grid.pixels, 3), np.uint8)
        render(decoded, chosen[0], image, scratch)
        write_packed(image, grid.patch_size, out)
        return
    if len(chosen) == 1:
        render(decoded, chosen[0], out, scratch)
        return
    free = out.reshape(-1)  # the same memory
    for view, size in zip(chosen, sizes, strict=True):
        render(decoded, view, free[: 3 * size**2].reshape(size, size, 3), scratch)
        free = free[3 * size**2 :]


def leave_compressed(image: Jpeg | OtherImage, view: View, row: np.ndarray) -> bool:
    """Writes a crop to a row of `compressed` without decoding it. Returns False if that cannot be."""
    if not isinstance(image, Jpeg) or view.resampling != "bilinear":
        return False
    part = image.part(view.box, view.reduction)
    return part is not None and write_compressed(part, view, row)


def images_shape(views: Sequence[TrainingView], *, compressed: bool = False) -> tuple[int, ...]:
    """The shape of a sample in a batch: [S, S, 3], all pixels of several views in a row, or a `packed_image`.

    compressed: for the GPU to decode, see there.
    """
    if (patches := views[0].patches) is not None:
        return (patches.bytes,)
    if compressed:
        return (row_bytes(views[0].size),)
    if len(views) == 1:
        return (views[0].size, views[0].size, 3)
    return (sum(view.numbers for view in views),)


def eval_shape(config: Config) -> tuple[int, ...]:
    """The same of evaluation."""
    patches, size = Patches.of(config), config.model.image_size
    return (size, size, 3) if patches is None else (patches.bytes,)


def unpack_views(images: Tensor, views: Sequence[TrainingView]) -> list[Tensor]:
    """uint8 [B, S, S, 3] for each of the views in uint8 [B, ...] of `images_shape`."""
    flat = images.flatten(1)
    parts = flat.split([view.numbers for view in views], dim=1)
    return [part.unflatten(1, (view.size, view.size, 3)) for part, view in zip(parts, views, strict=True)]


def distort_views(images: Sequence[Tensor], views: Sequence[TrainingView], seeds: np.ndarray) -> list[Tensor]:
    """Distorts those views of a batch, uint8 [B, S, S, 3] each, that are to be. seeds: int64 [B], of its samples."""
    return [
        distort(of_view, view_seeds(seeds, number, len(views)), blur=view.blur, invert=view.invert)
        if view.distorted
        else of_view
        for number, (of_view, view) in enumerate(zip(images, views, strict=True))
    ]
