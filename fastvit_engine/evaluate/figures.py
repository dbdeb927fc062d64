"""Draws what `inspection` found, each figure as PNG and SVG, for light and for dark pages."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastvit_engine.evaluate.themes import Theme, canvas, save, title_of
from fastvit_engine.models.inspect import patch_distances

_SHOWN = 6  # images of the rollout
_COLUMNS = 7  # of filters


class Subject(NamedTuple):
    """The model that figures are about."""

    title: str  # "B/16 of runs/b16"
    grid: int  # rows, and columns, of patches
    patch_size: int  # pixels


def draw(figure: str, arrays: Mapping[str, NDArray[Any]], subject: Subject, folder: Path) -> list[Path]:
    """Writes one of `inspection.FIGURES`, and returns the files: NAME.png, NAME.svg, NAME-dark.png, NAME-dark.svg."""
    return save(figure, partial(_DRAWERS[figure], arrays, subject), folder)


def _filters(arrays: Mapping[str, NDArray[Any]], subject: Subject, theme: Theme) -> Any:
    """Each component as a picture; grey is 0."""
    components, variances = arrays["filters"], arrays["filter_variance"]
    shares = variances / arrays["filter_variance_total"]
    rows = -(-len(components) // _COLUMNS)
    figure = canvas((7.2, 0.9 + 1.16 * rows))
    title = f"The first {len(components)} principal components of the patch filters"
    title_of(figure, title, f"{subject.title}; % of the variance of all filters", theme)
    for place, (axis, component) in enumerate(zip(_axes(figure, rows, _COLUMNS), components, strict=False)):
        picture = component.reshape(subject.patch_size, subject.patch_size, 3)
        axis.imshow(0.5 + 0.5 * picture / max(np.abs(picture).max(), 1e-12), interpolation="nearest")
        axis.set_title(f"{place + 1}: {100 * shares[place]:.1f} %", fontsize=7, color=theme.soft, pad=2)
    return figure


def _pos_embed(arrays: Mapping[str, NDArray[Any]], subject: Subject, theme: Theme) -> Any:
    """For every patch a map of how similar its embedding is to that of each patch, in the patch's place."""
    grid = subject.grid
    similarity = arrays["pos_embed_similarity"].reshape(grid, grid, grid, grid)
    gap = max(1, grid // 8)
    maps = np.pad(similarity, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=np.nan)
    mosaic = maps.transpose(0, 2, 1, 3).reshape(grid * (grid + gap), -1)[:-gap, :-gap]
    figure = canvas((6.4, 5.9))
    title_of(figure, "Similarity of position embeddings", subject.title, theme)
    axis = figure.subplots()
    image = axis.imshow(mosaic, cmap="viridis", vmin=-1, vmax=1, interpolation="nearest")
    centres = (grid + gap) * np.arange(grid) + (grid - 1) / 2
    shown = np.unique(np.linspace(0, grid - 1, min(grid, 8)).round().astype(int))
    axis.set_xticks(centres[shown], shown + 1)
    axis.set_yticks(centres[shown], shown + 1)
    axis.set_xlabel("column of the patch")
    axis.set_ylabel("row of the patch")
    figure.colorbar(image, ax=axis, label="cosine similarity", shrink=0.9)
    return figure


def _attention_distance(arrays: Mapping[str, NDArray[Any]], subject: Subject, theme: Theme) -> Any:
    """A point per head and layer."""
    from matplotlib.ticker import MaxNLocator

    distance = arrays["attention_distance"]  # [L, H]
    layers, heads = distance.shape
    even = float(patch_distances(subject.grid, subject.patch_size).mean())
    figure = canvas((6.8, 4.2))
    title_of(figure, "Mean attention distance", f"{subject.title}, {len(arrays['images'])} images", theme)
    axis = figure.subplots()
    at = np.arange(1, layers + 1)
    head = np.tile(np.arange(1, heads + 1), layers)
    outline = theme.soft  # of the points, as the darkest are dark on a dark page
    points = axis.scatter(
        np.repeat(at, heads), distance.ravel(), c=head, cmap="viridis", s=18, edgecolors=outline, linewidths=0.5
    )
    axis.plot(at, distance.mean(axis=1), color="#c8590b", linewidth=1.4, label="mean of the heads")
    axis.axhline(even, color=theme.soft, linestyle=":", linewidth=1.2, label="attention to all patches alike")
    axis.set_xlabel("block")
    axis.set_ylabel("distance (pixels)")
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, fontsize=8)
    figure.colorbar(points, ax=axis, label="head", ticks=MaxNLocator(integer=True))
    return figure


def _rollout(arrays: Mapping[str, NDArray[Any]], subject: Subject, theme: Theme) -> Any:
    """Images, and below each how much of every patch arrives at the output."""
    images, rollout = arrays["images"][:_SHOWN], arrays["rollout"][:_SHOWN]
    relative = rollout / rollout.mean(axis=(1, 2), keepdims=True)
    top = max(2.0, float(np.quantile(relative, 0.99)))  # a few patches may outshine all others
    figure = canvas((1.2 * len(images) + 1.4, 3.2))
    title_of(figure, "Attention from the output to the input, by rollout", subject.title, theme)
    axes = figure.subplots(2, len(images), squeeze=False)
    for image, seen, (above, below) in zip(images, relative, axes.T, strict=True):
        above.imshow(image)
        below.imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=255)
        size = image.shape[0]
        drawn = below.imshow(
            seen, cmap="inferno", alpha=0.75, vmin=0, vmax=top, extent=(0, size, size, 0), interpolation="bilinear"
        )
        for axis in (above, below):
            axis.set_axis_off()
    bar = figure.colorbar(drawn, ax=axes, extend="max", label="share of a patch (1: all alike)")
    bar.solids.set_alpha(1)
    return figure


_DRAWERS: dict[str, Callable[[Mapping[str, NDArray[Any]], Subject, Theme], Any]] = {
    "filters": _filters,
    "pos_embed": _pos_embed,
    "attention_distance": _attention_distance,
    "rollout": _rollout,
}


def _axes(figure: Any, rows: int, columns: int) -> list[Any]:
    """All places of a table of pictures, without axes."""
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes:
        axis.set_axis_off()
    return axes
