"""Draws what `fastvit robustness` measured of several models, side by side."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastvit_engine.evaluate.themes import Theme, canvas, save, title_of

# Each panel: the list of figures, what it runs over, its label, and the lines: a figure and how it is drawn.
_PANELS = (
    ("occlusion", "ratio", "share of the image dropped", (("top1", "-", "random"), ("top1_salient", ":", "salient"))),
    ("shuffle", "tiles", "rows and columns of tiles exchanged", (("top1", "-", "exchanged"),)),
    ("patch", "size", "side of the patch (pixels)", (("top1", "-", "optimised"), ("top1_plain", ":", "plain"))),
)


def draw(found: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Writes robustness.png, .svg, and both for dark pages; found: the figures of each model, with its name."""
    return save("robustness", partial(_figure, found), folder)


def _figure(found: Sequence[Mapping[str, Any]], theme: Theme) -> Any:
    panels = [panel for panel in _PANELS if panel[0] in found[0]]
    figure = canvas((3.3 * max(len(panels), 1) + 0.6, 3.6))
    names = [figures["model"].rstrip("/").rpartition("/")[2] for figures in found]
    if len(set(names)) < len(names):
        names = [figures["model"] for figures in found]
    samples = {figures["samples"] for figures in found}
    title_of(figure, "Top-1 accuracy that is left", f"{max(samples):,} images", theme)
    for axis, (name, over, label, lines) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        for number, figures in enumerate(found):
            rows = figures[name]
            for key, dashes, drawn in lines:
                axis.plot(
                    [row[over] for row in rows],
                    [100 * row[key] for row in rows],
                    dashes,
                    color=theme.series[number % len(theme.series)],
                    marker="o",
                    markersize=3,
                    linewidth=1.4,
                    label=f"{names[number]}, {drawn}",
                )
        axis.set_xlabel(label)
        axis.set_ylim(0, 100)
        axis.legend(frameon=False, fontsize=7)
    figure.axes[0].set_ylabel("top-1 (%)")
    return figure
