"""Line charts as HTML: an SVG that stretches with the page under labels that do not.

The SVG has `preserveAspectRatio="none"` and strokes that ignore scaling, and every text is HTML beside it: so charts fill
any width from a phone to paper with text of constant size, and take their colours from the page's style sheet.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_SIZE = 1000  # side of the SVG's own coordinate square
_BUCKETS = 400  # a line of more points than twice this is drawn from the extremes of so many buckets
_SMOOTH_FROM = 20  # points from which a noisy line gets a smoothed one over it


@dataclass(frozen=True)
class Series:
    """One quantity over the steps; NaN where there is no value."""

    name: str
    style: str  # class in the style sheet, which sets the colour
    steps: Array  # [N]
    values: Array  # [N]
    noisy: bool = False  # drawn light, under a smoothed line
    points: bool = False  # a dot on each value
    dashed: bool = False


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    from_zero: bool = False,
    form: Callable[[float], str] = "{:.4g}".format,
) -> str:
    """A figure of `series` over the training step. `form` writes the last values, which the legend shows."""
    series = [line for line in series if np.isfinite(line.values).any()]
    head = f"<h3>{escape(title)}</h3>"
    if not series:
        return f'<figure class="chart"><figcaption>{head}</figcaption><p class="note">Not recorded.</p></figure>'

    low, high, note = _value_range(series, from_zero, form)
    y_ticks = _ticks(low, high, 4, extend=True)
    x_ticks = _ticks(0.0, max(1.0, max(float(line.steps.max()) for line in series)), 5, extend=False)
    last_step = max(1.0, max(float(line.steps.max()) for line in series))
    exponent = math.floor(math.log10(y_ticks[-1])) if 0 < y_ticks[-1] < 0.01 and y_ticks[0] >= 0 else 0
    unit = " ".join(part for part in (f"×10{_superscript(exponent)}" if exponent else "", unit) if part)

    def x_place(step: float) -> float:
        return step / last_step

    def y_place(value: float) -> float:
        return 1 - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    y_labels = [_tick_label(tick / 10**exponent, (y_ticks[1] - y_ticks[0]) / 10**exponent) for tick in y_ticks]
    x_labels = [_tick_label(tick, x_ticks[1] - x_ticks[0]) for tick in x_ticks]
    grid = "".join(f"M0 {_SIZE * y_place(tick):.1f}H{_SIZE}" for tick in y_ticks)
    paths = "".join(_draw(line, x_place, y_place, form) for line in series)
    legend = "".join(
        f'<li class="{line.style}{" dashed" if line.dashed else ""}">{escape(line.name)} <b>{escape(_last(line, form))}</b></li>'
        for line in series
    )
    rows = "".join(
        f'<span style="top:{100 * y_place(tick):.2f}%">{label}</span>'
        for tick, label in zip(y_ticks, y_labels, strict=True)
    )
    columns = "".join(
        f'<span style="left:{100 * x_place(tick):.2f}%">{label}</span>'
        for tick, label in zip(x_ticks, x_labels, strict=True)
    )
    return (
        f'<figure class="chart"><figcaption>{head}<span class="unit">{escape(unit)}</span></figcaption>'
        f'<ul class="legend">{legend}</ul>'
        f'<div class="plot" style="--label:{max(map(len, y_labels))}ch"><div class="rows">{rows}</div>'
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img" aria-label="{escape(title)} by step">'
        f'<path class="grid" d="{grid}"/>{paths}</svg>'
        f'<div class="columns">{columns}</div><div class="axis">step</div></div>'
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + "</figure>"
    )


def smooth(steps: Array, values: Array) -> tuple[Array, Array]:
    """Centred moving average over about a twentieth of the line, twice; NaN counts for nothing.

    [N], [N] -> [M], [M] with M at most 800: a longer line is averaged in M equal parts first.
    """
    parts = np.array_split(np.arange(len(values)), min(len(values), 2 * _BUCKETS))
    known = np.isfinite(values)
    sums = np.array([values[part][known[part]].sum() for part in parts])
    weights = np.array([known[part].sum() for part in parts], dtype=np.float64)
    window = np.ones(2 * max(1, len(parts) // 40) + 1)
    for _ in range(2):
        sums, weights = np.convolve(sums, window, "same"), np.convolve(weights, window, "same")
    means = np.divide(sums, weights, out=np.full(len(parts), np.nan), where=weights > 0.5)
    return np.array([steps[part].mean() for part in parts]), means


def envelope(steps: Array, values: Array, buckets: int = _BUCKETS) -> tuple[Array, Array]:
    """At most `2 * buckets` of the points, each bucket's lowest and highest among them, so that no spike is lost."""
    if len(values) <= 2 * buckets:
        return steps, values
    chosen: list[int] = []
    for bucket in np.array_split(np.arange(len(values)), buckets):
        inside = bucket[np.isfinite(values[bucket])]
        if len(inside) == 0:
            chosen.append(int(bucket[0]))  # keeps the gap
        else:
            chosen += sorted({int(inside[values[inside].argmin()]), int(inside[values[inside].argmax()])})
    return steps[chosen], values[chosen]


def _draw(
    line: Series, x_place: Callable[[float], float], y_place: Callable[[float], float], form: Callable[[float], str]
) -> str:
    style = f"{line.style} dashed" if line.dashed else line.style

    def path(steps: Array, values: Array, extra: str = "") -> str:
        corners, pen = [], "M"
        for step, value in zip(steps, values, strict=True):
            if not math.isfinite(value):
                pen = "M"
                continue
            corners.append(f"{pen}{_SIZE * x_place(step):.1f} {_SIZE * y_place(value):.1f}")
            pen = "L"
        return f'<path class="line {style}{extra}" d="{"".join(corners)}"/>'

    if line.noisy and len(line.values) >= _SMOOTH_FROM:
        return path(*envelope(line.steps, line.values), " raw") + path(*smooth(line.steps, line.values))
    steps, values = envelope(line.steps, line.values)
    finite = np.isfinite(values)
    drawn = path(steps, values)
    if line.points or finite.sum() < _SMOOTH_FROM:
        # A line of no length with a round cap is a dot, and stays round however the square is stretched.
        drawn += "".join(
            f'<path class="point {line.style}" d="M{_SIZE * x_place(step):.1f} {_SIZE * y_place(value):.1f}h0">'
            f"<title>{escape(line.name)} at step {step:,.0f}: {escape(form(float(value)))}</title></path>"
            for step, value in zip(steps[finite], values[finite], strict=True)
        )
    return drawn


def _last(line: Series, form: Callable[[float], str]) -> str:
    """The value that the drawn line ends on."""
    smoothed = line.noisy and len(line.values) >= _SMOOTH_FROM
    values = smooth(line.steps, line.values)[1] if smoothed else line.values
    return form(float(values[np.isfinite(values)][-1]))


def _value_range(
    series: Sequence[Series], from_zero: bool, form: Callable[[float], str]
) -> tuple[float, float, str | None]:
    """Lowest and highest value to draw, and a note about what lies outside.

    Noisy lines may have spikes that would flatten all the rest; the range ends at three times the span of the middle
    98 % of the values beyond it.
    """
    lows, highs = [], []
    for line in series:
        finite = line.values[np.isfinite(line.values)]
        low, high = float(finite.min()), float(finite.max())
        if line.noisy and len(finite) >= _SMOOTH_FROM:
            first, last = np.percentile(finite, [1, 99])
            low, high = max(low, first - 3 * (last - first)), min(high, last + 3 * (last - first))
        lows.append(low)
        highs.append(high)
    low, high = min(lows), max(highs)
    values = np.concatenate([line.values[np.isfinite(line.values)] for line in series])
    outside = values[(values < low) | (values > high)]
    note = None
    if len(outside):
        farthest = float(outside[np.abs(outside - (low + high) / 2).argmax()])
        note = f"{len(outside):,} of {len(values):,} values lie outside the drawn range, the farthest {form(farthest)}."
    return min(low, 0.0) if from_zero else low, max(high, 0.0) if from_zero else high, note


def _ticks(low: float, high: float, count: int, *, extend: bool) -> list[float]:
    """About `count` steps of 1, 2 or 5 times a power of ten, from within [low, high], or around it with `extend`."""
    if high <= low:
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / rough)))
    tolerance = 1e-9
    first = math.floor(low / step + tolerance) if extend else math.ceil(low / step - tolerance)
    last = math.ceil(high / step - tolerance) if extend else math.floor(high / step + tolerance)
    return [index * step for index in range(first, last + 1)]


def _tick_label(value: float, step: float) -> str:
    if abs(step) >= 1000 and abs(value) >= 1e6:
        return f"{value / 1e6:,.4g}M"
    if abs(step) >= 1000 and abs(value) >= 1e4:
        return f"{value / 1e3:,.4g}k"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}".replace("-", "−")


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
