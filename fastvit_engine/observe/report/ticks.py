"""Round values along an axis, and how they are written."""

import math
from collections.abc import Sequence

COUNTS = ((1e9, "B", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4))  # scale, letter, least value that is written with it
FLOPS = ((1e21, "Z", 1e21), (1e18, "E", 1e18), (1e15, "P", 1e15), (1e12, "T", 1e12), (1e9, "G", 1e9), (1e6, "M", 1e6))


def value_ticks(low: float, high: float, from_zero: bool) -> list[float]:
    """About four round intervals that cover [low, high], and zero with `from_zero`."""
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high <= low:  # one value: in the middle, or an axis from 0 to 1
        low, high = (0.0, 1.0) if low == 0 else (low - 0.1 * abs(low), high + 0.1 * abs(high))
    size = _round_interval((high - low) / 4)
    return [index * size for index in range(math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9) + 1)]


def ticks_up_to(last: float, least: float = 0.0) -> list[float]:
    """About five round intervals of at least `least` from 0 on, within [0, last]."""
    size = max(least, _round_interval(last / 5))
    return [index * size for index in range(math.floor(last / size + 1e-9) + 1)]


def tick_labels(ticks: Sequence[float], letters: Sequence[tuple[float, str, float]] = COUNTS) -> tuple[list[str], str]:
    """Labels of equal scale, and the factor they have to be multiplied by ("×10⁻⁴") if they are very small."""
    largest, interval = max(abs(tick) for tick in ticks), ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    if 0 < largest < 0.01:
        exponent = math.floor(math.log10(largest) + 1e-9)
        labels, _ = tick_labels([tick / 10.0**exponent for tick in ticks])
        return labels, "×10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    scale, letter = next(((scale, letter) for scale, letter, least in letters if largest >= least), (1.0, ""))
    decimals = max(0, -math.floor(math.log10(interval / scale) + 1e-9))
    labels = [f"{tick / scale:,.{decimals}f}{letter}".replace("-", "−") if tick else "0" for tick in ticks]
    return labels, ""


def _round_interval(size: float) -> float:
    """The nearest of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return min((factor * power for factor in (1, 2, 5, 10)), key=lambda interval: abs(math.log(interval / size)))
