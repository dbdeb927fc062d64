"""Line charts as HTML: an SVG that stretches with the page, between labels that do not.

The SVG has `preserveAspectRatio="none"` and strokes that ignore scaling, and every text is HTML beside it: so charts
fill any width from a phone to paper with text of constant size, and take their colours from the page's style sheet.
Each chart also holds its values as JSON, from which the page's script shows them under the pointer and draws the lines
over another axis. Without the script, the chart is complete.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Literal, NamedTuple

import numpy as np

from fastvit_engine.observe.report.axes import Array, Axes
from fastvit_engine.observe.report.ticks import tick_labels, value_ticks

SIZE = 1000  # side of the SVG's own coordinate square
_POINTS = 800  # of one line; a longer one is drawn from the extremes of half as many buckets
_POINTS_IN_ALL = 6000  # of the lines of one chart
_TREND_POINTS = 200  # of a smoothed line
_TICK = 35  # height of a mark that is a tick, in the SVG's coordinates
_SMOOTH_FROM = 20  # points from which a noisy line gets a smoothed one over it
_DOTS_UP_TO = 100  # points up to which a line of exact values shows each of them
_DOTS_IN_ALL = 400  # of the lines of one chart


@dataclass(frozen=True)
class Form:
    """How values are written, here and by the page's script."""

    kind: Literal["significant", "fixed"]
    digits: int  # significant digits, or decimals
    suffix: str = ""

    def __call__(self, value: float) -> str:
        return (f"{value:.{self.digits}g}" if self.kind == "significant" else f"{value:,.{self.digits}f}") + self.suffix


SHORT, PERCENT, WHOLE = Form("significant", 3), Form("fixed", 1, " %"), Form("fixed", 0)


@dataclass(frozen=True)
class Series:
    """One quantity over the steps; NaN if there is no value."""

    name: str
    style: str  # class in the style sheet, which sets the colour
    steps: Array  # [N]
    values: Array  # [N]
    noisy: bool = False  # drawn light, under a smoothed line
    points: bool = False  # a dot on each value
    dash: int = 0  # pattern of the line in the style sheet, 0 to 4; 0: solid
    run: int = 0  # index of its run among those of the page

    @property
    def smoothed(self) -> bool:
        return self.noisy and np.isfinite(self.values).sum() >= _SMOOTH_FROM

    @property
    def classes(self) -> str:
        return f"{self.style} dash-{self.dash}" if self.dash else self.style


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: a line over the whole height or, if `tick`, a short one at the bottom."""

    step: float
    style: str  # class in the style sheet, and its name in the legend
    text: str  # shown under the pointer
    tick: bool = False


@dataclass(frozen=True)
class _Frame:
    """Maps values to positions in the plot: fractions of its width from the left and of its height from the top."""

    axes: Axes
    low: float
    high: float

    def top(self, value: float) -> float:
        """Values outside the range lie on its edge."""
        return 1 - (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)

    def y(self, value: float) -> str:
        return f"{SIZE * self.top(value):.1f}"


class _Line(NamedTuple):
    """A series as it is drawn."""

    series: Series
    steps: Array
    values: Array
    trend: tuple[Array, Array] | None  # steps and values of the smoothed line

    @property
    def last(self) -> float:
        values = self.values if self.trend is None else self.trend[1]
        return float(values[np.isfinite(values)][-1])


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    axes: Axes,
    *,
    from_zero: bool = False,
    form: Form = SHORT,
    marks: Sequence[Mark] = (),
) -> str:
    """A figure of `series` over the training. `form` writes the values that legend, notes and pointer show.

    Marks after the last step, whose rows a rewind has dropped, are drawn at that step.
    """
    head = f"<h3>{escape(title)}</h3>"
    series = [replace(line, values=np.where(np.isinf(line.values), np.nan, line.values)) for line in series]
    series = [line for line in series if np.isfinite(line.values).any()]
    if not series:
        return f'<figure class="chart"><figcaption>{head}</figcaption><p class="note">Not recorded.</p></figure>'

    points = min(_POINTS, _POINTS_IN_ALL // len(series))
    lines = [_Line(one, *envelope(one.steps, one.values, points // 2), _trend(one, points // 2)) for one in series]
    note = _note_outside(series, form)
    limits = [limit for one in series for limit in _limits(one)]
    ticks = value_ticks(min(limits), max(limits), from_zero)
    labels, factor = tick_labels(ticks)
    frame = _Frame(axes, ticks[0], ticks[-1])
    grid = "".join(f"M0.0 {frame.y(tick)}H{SIZE}" for tick in ticks)
    dots = _DOTS_IN_ALL // len(lines)
    paths = [_mark(mark, axes) for mark in marks] + [_draw(line, frame, form, dots) for line in lines]
    rows = "".join(
        f'<span style="top:{100 * frame.top(tick):.2f}%">{label}</span>'
        for tick, label in zip(ticks, labels, strict=True)
    )
    return (
        f'<figure class="chart"><figcaption>{head}<span class="unit">{escape(f"{factor} {unit}".strip())}</span>'
        f'</figcaption><ul class="legend">{"".join(_legend(lines, marks, form))}</ul>'
        f'<div class="plot" style="--label:{max(map(len, labels))}ch"><div class="rows">{rows}</div>'
        f'<div class="canvas" data-title="{escape(title)}"><svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(_in_words(title, lines, form))}">'
        f'<path class="grid" d="{grid}"/>{"".join(paths)}</svg></div>{columns(axes)}</div>'
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + f"{embedded(_for_script(lines, frame, form))}</figure>"
    )


def columns(axes: Axes) -> str:
    """What is written under a plot."""
    spans = "".join(f'<span style="left:{100 * left:.2f}%">{label}</span>' for left, label in axes.ticks(axes.shown))
    return f'<div class="columns">{spans}</div><div class="axis">{axes.name(axes.shown)}</div>'


def embedded(data: Any, name: str = "data") -> str:
    """Data as JSON that the page's script reads, and that no text in it can end."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" class="{name}">{text}</script>'


def smooth(steps: Array, values: Array, points: int = _TREND_POINTS) -> tuple[Array, Array]:
    """Local linear regression with Gaussian weights over about a tenth of the line.

    Unlike a moving average it neither lags nor bends at the ends of a steep line (Cleveland 1979, "Robust locally
    weighted regression", without the robust part).

    [N], [N] (finite, N >= 2) -> [M], [M] with M at most `points`: a longer line is averaged in M equal parts first.
    """
    parts = np.array_split(np.arange(len(values)), min(len(values), points))
    x = np.array([steps[part].mean() for part in parts])  # [M]
    y = np.array([values[part].mean() for part in parts])
    middle = np.array([part.mean() for part in parts]) * len(parts) / len(values)
    distance = middle[None, :] - middle[:, None]  # [M, M], in parts
    weights = np.exp(-0.5 * (distance / max(1.0, len(parts) / 40)) ** 2)
    # The line through each point's neighbourhood by least squares: its value at distance 0.
    s0, s1, s2 = ((weights * distance**power).sum(axis=1) for power in (0, 1, 2))
    t0, t1 = weights @ y, (weights * distance) @ y
    return x, (s2 * t0 - s1 * t1) / (s0 * s2 - s1**2)


def envelope(steps: Array, values: Array, buckets: int = _POINTS // 2) -> tuple[Array, Array]:
    """At most `2 * buckets` of the points, each bucket's lowest and highest among them, so that no spike is lost."""
    if len(values) <= 2 * buckets:
        return steps, values
    chosen: list[int] = []
    for bucket in np.array_split(np.arange(len(values)), buckets):
        known = bucket[np.isfinite(values[bucket])]
        if len(known) == 0:
            chosen.append(int(bucket[0]))  # keeps the gap
        else:
            chosen += sorted({int(known[values[known].argmin()]), int(known[values[known].argmax()])})
    return steps[chosen], values[chosen]


def _legend(lines: Sequence[_Line], marks: Sequence[Mark], form: Form) -> list[str]:
    entries = [
        f'<li class="{line.series.classes}"><svg class="key" viewBox="0 0 24 4" aria-hidden="true">'
        f'<path class="line" d="M1 2H23"/></svg>{escape(line.series.name)} <b>{escape(form(line.last))}</b></li>'
        for line in lines
    ]
    for style in dict.fromkeys(mark.style for mark in marks):
        count = sum(mark.style == style for mark in marks)
        entries.append(f'<li class="mark {style}">{style} <b>{count:,}</b></li>')
    return entries


def _in_words(title: str, lines: Sequence[_Line], form: Form) -> str:
    """The chart for those who do not see it."""
    return f"{title} over the training; at the end: " + ", ".join(
        f"{line.series.name} {form(line.last)}" for line in lines
    )


def _mark(mark: Mark, axes: Axes) -> str:
    left = SIZE * axes.left(np.array([mark.step]))[0]
    start = SIZE - _TICK if mark.tick else 0
    return (
        f'<path class="mark {mark.style}" data-step="{mark.step:.0f}" d="M{left:.1f} {start}V{SIZE}">'
        f"<title>{escape(mark.text)}</title></path>"
    )


def _draw(line: _Line, frame: _Frame, form: Form, dots: int) -> str:
    """The paths of a line; if its values are exact and few, with dots that show them under the pointer."""
    series, classes = line.series, line.series.classes
    if line.trend is not None:
        raw = _path(line.steps, line.values, frame, series, f"{classes} raw")
        return raw + _path(*line.trend, frame, series, classes)
    drawn = _path(line.steps, line.values, frame, series, classes)
    known = np.isfinite(series.values)
    if known.sum() > min(dots, _DOTS_UP_TO if series.points else _SMOOTH_FROM):
        return drawn
    steps, values = series.steps[known], series.values[known]
    # A line of no length with a round cap is a dot, and stays round however the square is stretched.
    return drawn + "".join(
        f'<path class="point {series.style}" data-step="{step:.0f}" data-run="{series.run}" '
        f'd="M{SIZE * left:.1f} {frame.y(value)}h0">'
        f"<title>{escape(series.name)} at step {step:,.0f}: {escape(form(float(value)))}</title></path>"
        for step, left, value in zip(steps, frame.axes.left(steps, series.run), values, strict=True)
    )


def _path(steps: Array, values: Array, frame: _Frame, series: Series, classes: str) -> str:
    """A line with gaps at NaN values."""
    corners, pen = [], "M"
    for left, value in zip(frame.axes.left(steps, series.run), values, strict=True):
        if math.isfinite(value):
            corners.append(f"{pen}{SIZE * left:.1f} {frame.y(value)}")
        pen = "L" if math.isfinite(value) else "M"
    return f'<path class="line {classes}" d="{"".join(corners)}"/>'


def _trend(line: Series, points: int) -> tuple[Array, Array] | None:
    """The smoothed line, of the values that are drawn: one wild value would drag its surroundings along."""
    if not line.smoothed:
        return None
    low, high = _limits(line)
    inside = (line.values >= low) & (line.values <= high)
    return smooth(line.steps[inside], line.values[inside], min(_TREND_POINTS, points))


def _limits(line: Series) -> tuple[float, float]:
    """Lowest and highest value to draw.

    A noisy line may have spikes that would flatten all the rest: it is cut if they are more than three times as far
    from the middle 98 % of its values as those lie apart.
    """
    known = line.values[np.isfinite(line.values)]
    low, high = float(known.min()), float(known.max())
    if line.smoothed:
        first, last = (float(value) for value in np.percentile(known, [1, 99]))
        margin = 3 * (last - first)
        kept = known[(known >= first - margin) & (known <= last + margin)]
        low, high = float(kept.min()), float(kept.max())
    return low, high


def _note_outside(series: Sequence[Series], form: Form) -> str | None:
    """Says what `_limits` cut off."""
    outside: list[float] = []
    for line in series:
        low, high = _limits(line)
        outside += [float(value) for value in line.values if value < low or value > high]
    if not outside:
        return None
    if len(outside) == 1:
        return f"One value lies outside the drawn range: {form(outside[0])}."
    return f"{len(outside):,} values lie outside the drawn range, from {form(min(outside))} to {form(max(outside))}."


def _for_script(lines: Sequence[_Line], frame: _Frame, form: Form) -> dict[str, Any]:
    """The values of a chart, in the order of the drawn lines."""
    return {
        "low": frame.low,
        "high": frame.high,
        "form": [form.kind, form.digits, form.suffix],
        "lines": [
            {
                "name": line.series.name,
                "classes": line.series.classes,
                "run": line.series.run,
                "x": [round(float(step)) for step in line.steps],
                "y": _rounded(line.values),
                "trend": line.trend
                and {"x": [round(float(step), 1) for step in line.trend[0]], "y": _rounded(line.trend[1])},
            }
            for line in lines
        ],
    }


def _rounded(values: Array) -> list[float | None]:
    """Five digits each; None for NaN."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in np.clip(values, -1e308, 1e308)]
