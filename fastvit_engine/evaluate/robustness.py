"""What is left of a model's accuracy if parts of its images are missing, are elsewhere, or are made to deceive it.

Cells of a grid are dropped or exchanged as in Naseer et al. 2021, "Intriguing Properties of Vision Transformers"; a
patch that deceives is one for all images and places, as in Brown et al. 2017, "Adversarial Patch".
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastvit_engine.data import Batch
from fastvit_engine.data.pixels.draws import on_device, sample_seeds, uniforms
from fastvit_engine.errors import UserError
from fastvit_engine.evaluate.record import check_scores

Seeds = NDArray[np.int64]  # [B], one for each image
# Images as `normalised` gives them, and their seeds -> names, and what the model then sees instead.
Changes = Callable[[Tensor, Seeds], Iterator[tuple[Hashable, Tensor]]]

RATIOS = tuple(tenths / 10 for tenths in range(1, 10))  # of cells that are dropped
TILES = (2, 4, 7, 8, 14)  # rows, and columns
SIDES = (16, 32, 48, 64)  # pixels of a patch, for images of 224
WHOLE = "whole"  # the name of images as they are
_MOST_CELLS = 14  # rows, and columns
_STREAM_OF_CELLS, _STREAM_OF_TILES, _STREAM_OF_PLACES = 9000, 9100, 9200  # of `uniforms`; others are in data/pixels/


class Usable(NamedTuple):
    """The usable images of a batch."""

    images: Tensor  # float32 [B, 3, S, S], normalised: 0 is the mean colour
    labels: Tensor  # int64 [B]
    positions: NDArray[np.int64]  # [B], among all samples
    keys: list[str]  # B


class Pixels(NamedTuple):
    """How a model normalises images in [0, 1]: mean and standard deviation of each colour, float32 [3, 1, 1]."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, mean: Iterable[float], std: Iterable[float], device: torch.device) -> "Pixels":
        columns = (torch.tensor(tuple(values), dtype=torch.float32, device=device) for values in (mean, std))
        return cls(*(column.view(3, 1, 1) for column in columns))

    def normalised(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def usable_images(batches: Iterable[Batch], pixels: Pixels, outputs: int, since: int = 0) -> Iterator[Usable]:
    """The usable images of each batch, at positions from `since` on.

    Raises UserError for images of several labels, labels from `outputs` on, and if no image is usable.
    """
    found = 0
    for batch in batches:
        if batch.labels.ndim != 1:
            raise UserError("robustness needs one label per image: set data.max_labels=1")
        kept = np.flatnonzero((batch.weights.numpy() > 0) & (batch.seeds >= since))
        if not len(kept):
            continue
        found += len(kept)
        keys, labels = [batch.keys[row] for row in kept], batch.labels[kept]
        if int(labels.max()) >= outputs:
            row = int(labels.argmax())
            raise UserError(
                f"sample '{keys[row]}' has label {int(labels[row])}, outside 0..{outputs - 1}: measure the model on "
                "images of its own classes"
            )
        images = batch.images[kept]
        images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
        device = pixels.mean.device
        yield Usable(pixels.normalised(images.to(device).float() / 255), labels.to(device), batch.seeds[kept], keys)
    if not found:
        raise UserError("no sample has a usable image: see what `fastvit data verify` says of the shards")


def in_order(parts: Iterable[Usable], size: int) -> list[Usable]:
    """The same images in the order of the shards, whatever order several workers gave them in; `size` to a part."""
    found = list(parts)
    positions, keys = np.concatenate([part.positions for part in found]), [key for part in found for key in part.keys]
    images, labels = torch.cat([part.images for part in found]), torch.cat([part.labels for part in found])
    ordered = []
    for rows in torch.from_numpy(positions.argsort(kind="stable")).split(size):
        names, here = [keys[row] for row in rows], rows.to(images.device)
        ordered.append(Usable(images[here], labels[here], positions[rows.numpy()], names))
    return ordered


def accuracies(
    model: nn.Module, parts: Iterable[Usable], changes: Sequence[Changes], seed: int = 0
) -> tuple[dict[Any, float], int]:
    """Top-1 accuracy by the name of each change, and of `WHOLE` images; and the number of images.

    What is random about an image follows from `seed` and its position, whatever its batch. Raises UserError for scores
    that are not finite.
    """
    right: Counter[Hashable] = Counter()
    total = 0
    for part in parts:
        total += len(part.keys)
        seeds = sample_seeds(seed, part.positions)
        for change in (_whole, *changes):
            for name, images in change(part.images, seeds):
                with torch.no_grad():
                    scores = model(images.to(_dtype(model)))
                check_scores(scores, part.keys)
                right[name] += int((scores.argmax(dim=1) == part.labels).sum())
    return {name: count / total for name, count in right.items()}, total


def _whole(images: Tensor, seeds: Seeds) -> Iterator[tuple[Hashable, Tensor]]:
    yield WHOLE, images


def occluded(model: nn.Module) -> Changes:
    """Images with each of RATIOS of their cells in the mean colour; named ("random" or "salient", ratio).

    random: any cells; salient: first those on which the model's highest score depends most, see `salience`.
    """

    def changes(images: Tensor, seeds: Seeds) -> Iterator[tuple[Hashable, Tensor]]:
        cells = cells_of(images.shape[-1])
        at_random = uniforms(seeds, cells**2, stream=_STREAM_OF_CELLS).argsort(axis=1, kind="stable")
        by_salience = salience(model, images, cells).argsort(dim=1, descending=True, stable=True)
        for kind, order in (("random", on_device(at_random, images.device)), ("salient", by_salience)):
            for ratio in RATIOS:
                yield (kind, ratio), dropped(images, order[:, : round(ratio * cells**2)], cells)

    return changes


def shuffled(images: Tensor, seeds: Seeds) -> Iterator[tuple[Hashable, Tensor]]:
    """Images cut into tiles that change places; named by the rows of tiles, which are TILES that divide the image."""
    for tiles in TILES:
        if images.shape[-1] % tiles == 0:
            drawn = uniforms(seeds, tiles**2, stream=_STREAM_OF_TILES + tiles).argsort(axis=1, kind="stable")
            yield tiles, exchanged(images, on_device(drawn, images.device), tiles)


def with_patches(patches: Iterable[Tensor]) -> Changes:
    """Images with a patch [3, P, P], normalised, at a random place; named ("optimised", P).

    And, named ("plain", P), images with a patch of the mean colour in the same place.
    """
    patches = list(patches)

    def changes(images: Tensor, seeds: Seeds) -> Iterator[tuple[Hashable, Tensor]]:
        for patch in patches:
            side = patch.shape[-1]
            corners = random_corners(seeds, images.shape[-1], side)
            yield ("optimised", side), pasted(images, patch, corners)
            yield ("plain", side), pasted(images, torch.zeros_like(patch), corners)

    return changes


def deceptive_patch(
    model: nn.Module, parts: Sequence[Usable], pixels: Pixels, side: int, *, steps: int, seed: int = 0
) -> Tensor:
    """A patch [3, side, side], normalised, that raises the model's loss on these images wherever it is put.

    Adam on the mean cross-entropy, a part after the other and over again, with other places in each step. Every pixel
    can be one of a picture, as the sigmoid of what is learned is in [0, 1]. `model` must be in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    learned = torch.randn((3, side, side), generator=generator).to(pixels.mean.device).requires_grad_()
    optimizer = torch.optim.Adam([learned], lr=0.1)
    for step in range(steps):
        part = parts[step % len(parts)]
        corners = random_corners(sample_seeds(seed, part.positions, 1 + step), part.images.shape[-1], side)
        seen = pasted(part.images, pixels.normalised(learned.sigmoid()), corners)
        loss = F.cross_entropy(model(seen.to(_dtype(model))).float(), part.labels)
        (learned.grad,) = torch.autograd.grad(-loss, [learned])
        optimizer.step()
    return pixels.normalised(learned.detach().sigmoid())


def sides_for(size: int) -> tuple[int, ...]:
    """SIDES in proportion to images of `size` pixels."""
    return tuple(max(1, round(side * size / 224)) for side in SIDES)


def cells_of(size: int) -> int:
    """Rows, and columns, of the cells of an image: 14, or the largest number below that divides its size."""
    return next(cells for cells in range(_MOST_CELLS, 0, -1) if size % cells == 0)


def salience(model: nn.Module, images: Tensor, cells: int) -> Tensor:
    """The mean absolute gradient of the highest score by the pixels of each of cells x cells: [B, cells^2]."""
    pixels = images.to(_dtype(model), copy=True).requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(model(pixels).amax(dim=1).sum(), [pixels])
    return F.avg_pool2d(gradient.float().abs().mean(dim=1, keepdim=True), images.shape[-1] // cells).flatten(1)


def dropped(images: Tensor, chosen: Tensor, cells: int) -> Tensor:
    """Images with the cells `chosen` [B, K], of cells x cells, in the mean colour."""
    kept = torch.ones(len(images), cells**2, dtype=images.dtype, device=images.device).scatter_(1, chosen, 0.0)
    mask = kept.view(-1, 1, cells, cells)
    return images * mask.repeat_interleave(images.shape[-1] // cells, 2).repeat_interleave(images.shape[-1] // cells, 3)


def exchanged(images: Tensor, order: Tensor, tiles: int) -> Tensor:
    """Images of tiles x tiles in another order: in place n stands tile order[b, n]."""
    (batch, colours, size), side = images.shape[:3], images.shape[-1] // tiles
    cut = images.view(batch, colours, tiles, side, tiles, side).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [B, T^2, ...]
    moved = cut[torch.arange(batch, device=images.device)[:, None], order]
    return (
        moved.view(batch, tiles, tiles, colours, side, side)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(batch, colours, size, size)
    )


def random_corners(seeds: Seeds, size: int, side: int) -> NDArray[np.int64]:
    """The row and column [B, 2] of the first pixel of a patch, anywhere in images of `size` pixels."""
    return (uniforms(seeds, 2, stream=_STREAM_OF_PLACES + side) * (size - side + 1)).astype(np.int64)


def pasted(images: Tensor, patch: Tensor, corners: NDArray[np.int64]) -> Tensor:
    """Images with a patch [3, P, P] over each, whose first pixel is in the place that `corners` [B, 2] names."""
    side, place = patch.shape[-1], torch.from_numpy(corners).to(images.device)
    rows, columns = (place[:, axis, None] + torch.arange(side, device=images.device) for axis in (0, 1))  # [B, P]
    which = torch.arange(len(images), device=images.device)[:, None, None]
    result = images.permute(0, 2, 3, 1).clone()  # [B, S, S, 3]
    result[which, rows[:, :, None], columns[:, None, :]] = patch.permute(1, 2, 0).expand(len(images), -1, -1, -1)
    return result.permute(0, 3, 1, 2).contiguous()


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
