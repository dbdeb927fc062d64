"""The picture of `sizing.scaling`: speed, efficiency and exposed communication by the number of devices."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastvit_engine.evaluate.themes import Theme, canvas, save, title_of
from fastvit_engine.sizing.scaling import Point


def draw(points: Sequence[Point], title: str, devices: str, folder: Path, *, measured: bool) -> list[Path]:
    """Writes scaling.png, .svg, and both for dark pages. measured: whether the speed of one device is."""
    shown = [point for point in points if point.step is not None]
    return save("scaling", partial(_figure, shown, title, devices, measured), folder)


def _figure(points: Sequence[Point], title: str, devices: str, measured: bool, theme: Theme) -> Any:
    figure = canvas((9.6, 3.6))
    about = "one is measured, the rest is modelled" if measured else "all figures are modelled, none is measured"
    title_of(figure, title, about, theme)
    sizes = [point.processes for point in points]
    speed, efficiency, exposed = figure.subplots(1, 3)
    alone = points[0].images_per_second / points[0].efficiency / points[0].processes
    speed.plot(sizes, [alone * size for size in sizes], ":", color=theme.soft, linewidth=1.2, label="no communication")
    _line(speed, sizes, [point.images_per_second for point in points], theme, 0, "modelled")
    speed.set_yscale("log")
    speed.set_ylabel("images/s")
    _line(efficiency, sizes, [100 * point.efficiency for point in points], theme, 1, "modelled")
    efficiency.set_ylim(0, 105)
    efficiency.set_ylabel("efficiency (%)")
    steps = [point.step for point in points if point.step is not None]
    _line(exposed, sizes, [1e3 * step.exposed for step in steps], theme, 2, "exposed")
    _line(exposed, sizes, [1e3 * step.communicating for step in steps], theme, 4, "all communication", "--")
    exposed.set_ylim(bottom=0)
    exposed.set_ylabel("ms per step")
    exposed.legend(frameon=False, fontsize=7, labelcolor=theme.ink)
    if measured and points[0].is_alone:
        speed.plot([1], [points[0].images_per_second], "s", color=theme.ink, markersize=5, label="measured")
    speed.legend(frameon=False, fontsize=7, labelcolor=theme.ink)
    for axis in (speed, efficiency, exposed):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes[:: max(1, len(sizes) // 5)], [f"{size}" for size in sizes[:: max(1, len(sizes) // 5)]])
        axis.set_xticks([], minor=True)
        axis.set_xlabel(devices)
        axis.grid(axis="y", color=theme.line, linewidth=0.7)
        axis.set_axisbelow(True)
    return figure


def _line(
    axis: Any, x: Sequence[float], y: Sequence[float], theme: Theme, colour: int, label: str, dashes: str = "-"
) -> None:
    axis.plot(
        x, y, dashes, color=theme.series[colour], marker="o", markersize=3, markerfacecolor=theme.page, label=label
    )
