"""Line charts as HTML: an SVG that stretches with the page, between labels that do not.

The SVG has `preserveAspectRatio="none"` and strokes that ignore scaling, and every text is HTML beside it: so charts
fill any width from a phone to paper with text of constant size, and take their colours from the page's style sheet.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_SIZE = 1000  # side of the SVG's own coordinate square
_BUCKETS = 400  # a line of more points than twice this is drawn from the extremes of so many buckets
_TICK = 35  # height of a mark that is a tick, in those coordinates
_SMOOTH_FROM = 20  # points from which a noisy line gets a smoothed one over it
_DOTS_UP_TO = 100  # points up to which a line of exact values shows each of them


@dataclass(frozen=True)
class Series:
    """One quantity over the steps; NaN if there is no value."""

    name: str
    style: str  # class in the style sheet, which sets the colour
    steps: Array  # [N]
    values: Array  # [N]
    noisy: bool = False  # drawn light, under a smoothed line
    points: bool = False  # a dot on each value
    dashed: bool = False

    @property
    def smoothed(self) -> bool:
        return self.noisy and np.isfinite(self.values).sum() >= _SMOOTH_FROM


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

    last_step: float
    low: float
    high: float

    def left(self, step: float) -> float:
        return step / self.last_step

    def top(self, value: float) -> float:
        """Values outside the range lie on its edge."""
        return 1 - (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)

    def point(self, step: float, value: float) -> str:
        return f"{_SIZE * self.left(step):.1f} {_SIZE * self.top(value):.1f}"


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    from_zero: bool = False,
    form: Callable[[float], str] = "{:.4g}".format,
    marks: Sequence[Mark] = (),
) -> str:
    """A figure of `series` over the training step. `form` writes the values that legend and notes show.

    Marks after the last step of the series, whose rows a rewind has dropped, are drawn at that step.
    """
    head = f"<h3>{escape(title)}</h3>"
    series = [replace(line, values=np.where(np.isinf(line.values), np.nan, line.values)) for line in series]
    series = [line for line in series if np.isfinite(line.values).any()]
    if not series:
        return f'<figure class="chart"><figcaption>{head}</figcaption><p class="note">Not recorded.</p></figure>'

    note = _note_outside(series, form)
    limits = [limit for line in series for limit in _limits(line)]
    y_ticks = _value_ticks(min(limits), max(limits), from_zero)
    frame = _Frame(max(1.0, *(float(line.steps.max()) for line in series)), y_ticks[0], y_ticks[-1])
    x_ticks = _step_ticks(frame.last_step)
    y_labels, factor = _tick_labels(y_ticks)
    x_labels, _ = _tick_labels(x_ticks)

    grid = "".join(f"M{frame.point(0, tick)}H{_SIZE}" for tick in y_ticks)
    legend, paths = [], []
    for line in series:
        trend = _trend(line) if line.smoothed else None
        values = line.values[np.isfinite(line.values)] if trend is None else trend[1]
        legend.append(
            f'<li class="{_classes(line)}">{escape(line.name)} <b>{escape(form(float(values[-1])))}</b></li>',
        )
        paths += [_raw(line, frame), _path(*trend, frame, _classes(line))] if trend else [_exact(line, frame, form)]
    for style in dict.fromkeys(mark.style for mark in marks):
        count = sum(mark.style == style for mark in marks)
        legend.append(f'<li class="mark {style}">{style} <b>{count:,}</b></li>')
    paths = [_mark(mark, frame) for mark in marks] + paths
    rows = (
        f'<span style="top:{100 * frame.top(tick):.2f}%">{label}</span>'
        for tick, label in zip(y_ticks, y_labels, strict=True)
    )
    columns = (
        f'<span style="left:{100 * frame.left(tick):.2f}%">{label}</span>'
        for tick, label in zip(x_ticks, x_labels, strict=True)
    )
    return (
        f'<figure class="chart"><figcaption>{head}<span class="unit">{escape(f"{factor} {unit}".strip())}</span>'
        f'</figcaption><ul class="legend">{"".join(legend)}</ul>'
        f'<div class="plot" style="--label:{max(map(len, y_labels))}ch"><div class="rows">{"".join(rows)}</div>'
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)} by step"><path class="grid" d="{grid}"/>{"".join(paths)}</svg>'
        f'<div class="columns">{"".join(columns)}</div><div class="axis">step</div></div>'
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + "</figure>"
    )


def _mark(mark: Mark, frame: _Frame) -> str:
    left = _SIZE * frame.left(min(mark.step, frame.last_step))
    start = _SIZE - _TICK if mark.tick else 0
    return f'<path class="mark {mark.style}" d="M{left:.1f} {start}V{_SIZE}"><title>{escape(mark.text)}</title></path>'


def smooth(steps: Array, values: Array) -> tuple[Array, Array]:
    """Local linear regression with Gaussian weights over about a tenth of the line.

    Unlike a moving average it neither lags nor bends at the ends of a steep line (Cleveland 1979, "Robust locally
    weighted regression", without the robust part).

    [N], [N] (finite, N >= 2) -> [M], [M] with M at most 800: a longer line is averaged in M equal parts first.
    """
    parts = np.array_split(np.arange(len(values)), min(len(values), 2 * _BUCKETS))
    x = np.array([steps[part].mean() for part in parts])  # [M]
    y = np.array([values[part].mean() for part in parts])
    index = np.arange(len(parts))
    distance = index[None, :] - index[:, None]  # [M, M]
    weights = np.exp(-0.5 * (distance / max(1.0, len(parts) / 40)) ** 2)
    # The line through each point's neighbourhood by least squares: its value at distance 0.
    s0, s1, s2 = ((weights * distance**power).sum(axis=1) for power in (0, 1, 2))
    t0, t1 = weights @ y, (weights * distance) @ y
    return x, (s2 * t0 - s1 * t1) / (s0 * s2 - s1**2)


def envelope(steps: Array, values: Array, buckets: int = _BUCKETS) -> tuple[Array, Array]:
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


def _classes(line: Series) -> str:
    return f"{line.style} dashed" if line.dashed else line.style


def _path(steps: Array, values: Array, frame: _Frame, classes: str) -> str:
    """A line with gaps at NaN values."""
    corners, pen = [], "M"
    for step, value in zip(steps, values, strict=True):
        if math.isfinite(value):
            corners.append(pen + frame.point(step, value))
        pen = "L" if math.isfinite(value) else "M"
    return f'<path class="line {classes}" d="{"".join(corners)}"/>'


def _raw(line: Series, frame: _Frame) -> str:
    return _path(*envelope(line.steps, line.values), frame, f"{_classes(line)} raw")


def _exact(line: Series, frame: _Frame, form: Callable[[float], str]) -> str:
    """A line of exact values; if they are few, with dots that show their values under the pointer."""
    drawn = _path(*envelope(line.steps, line.values), frame, _classes(line))
    known = np.isfinite(line.values)
    if known.sum() > (_DOTS_UP_TO if line.points else _SMOOTH_FROM):
        return drawn
    # A line of no length with a round cap is a dot, and stays round however the square is stretched.
    return drawn + "".join(
        f'<path class="point {line.style}" d="M{frame.point(step, value)}h0">'
        f"<title>{escape(line.name)} at step {step:,.0f}: {escape(form(float(value)))}</title></path>"
        for step, value in zip(line.steps[known], line.values[known], strict=True)
    )


def _trend(line: Series) -> tuple[Array, Array]:
    """The smoothed line, of the values that are drawn: one wild value would drag its surroundings along."""
    low, high = _limits(line)
    inside = (line.values >= low) & (line.values <= high)
    return smooth(line.steps[inside], line.values[inside])


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


def _note_outside(series: Sequence[Series], form: Callable[[float], str]) -> str | None:
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


def _value_ticks(low: float, high: float, from_zero: bool) -> list[float]:
    """About four round intervals that cover [low, high], and zero with `from_zero`."""
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high <= low:  # one value: in the middle, or an axis from 0 to 1
        low, high = (0.0, 1.0) if low == 0 else (low - 0.1 * abs(low), high + 0.1 * abs(high))
    size = _round_interval((high - low) / 4)
    return [index * size for index in range(math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9) + 1)]


def _step_ticks(last_step: float) -> list[float]:
    """About five round intervals from 0 on, of whole steps, within [0, last_step]."""
    size = max(1.0, _round_interval(last_step / 5))
    return [index * size for index in range(math.floor(last_step / size + 1e-9) + 1)]


def _round_interval(size: float) -> float:
    """The nearest of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return min((factor * power for factor in (1, 2, 5, 10)), key=lambda interval: abs(math.log(interval / size)))


def _tick_labels(ticks: Sequence[float]) -> tuple[list[str], str]:
    """Labels of equal scale, and the factor they have to be multiplied by ("×10⁻⁴") if they are very small."""
    largest, interval = max(abs(tick) for tick in ticks), ticks[1] - ticks[0]
    if largest < 0.01:
        exponent = math.floor(math.log10(largest) + 1e-9)
        labels, _ = _tick_labels([tick / 10.0**exponent for tick in ticks])
        return labels, "×10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    scale, letter = next(
        (scale, letter) for scale, letter, least in ((1e6, "M", 1e6), (1e3, "k", 1e4), (1, "", 0)) if largest >= least
    )
    decimals = max(0, -math.floor(math.log10(interval / scale) + 1e-9))
    labels = [f"{tick / scale:,.{decimals}f}{letter}".replace("-", "−") if tick else "0" for tick in ticks]
    return labels, ""
