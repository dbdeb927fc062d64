"""Where the time of a training step goes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fastvit_engine.observe.metrics import TrainRow

# Key of a metrics row, name, class in the style sheet.
PARTS = (
    ("data_wait", "waiting for data", "eval"),
    ("forward", "forward", "train"),
    ("backward", "backward", "ema"),
    ("update", "update", "update"),
)


class Part(NamedTuple):
    """A part of the mean step."""

    name: str
    style: str
    share: float  # of the step, 0 to 1
    seconds: float


class StepTime(NamedTuple):
    """The mean step of a run."""

    seconds: float
    parts: list[Part]  # with what remains, last


def mean_step(train: Sequence[TrainRow]) -> StepTime | None:
    """The mean over a run's logged steps; None if they do not say where their time went.

    The first row is left out: data workers start and kernels are compiled.
    """
    total, steps, sums = 0.0, 0, dict.fromkeys([key for key, _, _ in PARTS], 0.0)
    for before, row in zip(train, train[1:], strict=False):
        seconds, taken = row["seconds"] - before["seconds"], row["step"] - before["step"]
        if "forward" not in row or seconds <= 0 or taken <= 0:
            continue
        total, steps = total + seconds, steps + taken
        for key in sums:
            sums[key] += seconds * float(row.get(key, 0.0))  # type: ignore[arg-type]  # numbers, of these keys
    if not steps or not math.isfinite(total) or not 0 < sum(sums.values()) < math.inf:
        return None
    shares = {key: part / total for key, part in sums.items()}
    parts = [Part(name, style, shares[key], shares[key] * total / steps) for key, name, style in PARTS]
    rest = max(0.0, 1 - sum(shares.values()))
    return StepTime(total / steps, [*parts, Part("everything else", "rest", rest, rest * total / steps)])
