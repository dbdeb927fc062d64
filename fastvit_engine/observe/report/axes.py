"""What the horizontal axis of a page's charts counts: steps, images, time or FLOPs of training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fastvit_engine.observe.metrics import TrainRow
from fastvit_engine.observe.report.ticks import FLOPS, tick_labels, ticks_up_to

Array = NDArray[np.float64]
Axis = Literal["steps", "samples", "hours", "flops"]
AXES: tuple[Axis, ...] = get_args(Axis)
TITLES: Mapping[Axis, str] = {"steps": "Steps", "samples": "Images", "hours": "Time", "flops": "FLOPs"}
_KNOTS = 200  # rows of a run between which the axes are interpolated
_TIMES = ((2 * 3600, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))  # from, seconds of one, name


@dataclass(frozen=True)
class Progress:
    """How far a run was at each step: images, hours and FLOPs, interpolated between some of its rows."""

    knots: Mapping[Axis, Array]  # each [K], not decreasing, from 0 on

    @classmethod
    def of_run(cls, rows: Sequence[TrainRow], last_step: int, batch_size: int, flops_per_image: float) -> "Progress":
        """`last_step`, `batch_size`: of the run; they stand for rows if there are none."""
        if rows:
            chosen = [rows[place] for place in np.unique(np.linspace(0, len(rows) - 1, _KNOTS).astype(int))]
            counted = [(row["step"], row["samples"], row["seconds"], flops_of(row, flops_per_image)) for row in chosen]
        else:
            counted = [(last_step, last_step * batch_size, 0.0, last_step * batch_size * flops_per_image)]
        steps, samples, seconds, flops = np.maximum.accumulate(np.array([(0, 0, 0, 0), *counted], dtype=np.float64)).T
        return cls({"steps": steps, "samples": samples, "hours": seconds / 3600, "flops": flops})

    def at(self, axis: Axis, steps: Array) -> Array:
        """Where steps [N] lie on an axis. Those after the last row, if any, lie at its place."""
        if axis == "steps":
            return steps
        return np.interp(steps, self.knots["steps"], self.knots[axis])


def flops_of(row: TrainRow, flops_per_image: float) -> float:
    """Of the training up to a row; of one that an earlier version wrote, by what an image costs."""
    return row.get("flops", row["samples"] * flops_per_image)


class Axes:
    """The horizontal axes of all charts of a page, one of which is shown without JavaScript.

    progress, last_steps: of each run. The axis of every chart reaches to the end of the longest run.
    """

    def __init__(self, progress: Sequence[Progress], last_steps: Sequence[int], shown: Axis = "steps") -> None:
        self.progress, self.shown = progress, shown
        self._last = {axis: self._longest(axis, last_steps) for axis in AXES}

    def left(self, steps: Array, run: int = 0) -> Array:
        """Fractions of the width at which steps [N] of a run are drawn, between 0 and 1."""
        return np.clip(self.progress[run].at(self.shown, steps) / self._last[self.shown], 0.0, 1.0)

    def name(self, axis: Axis) -> str:
        if axis == "hours":
            return f"{self._time()[1]} of training"
        return {"steps": "step", "samples": "training images", "flops": "training FLOPs"}[axis]

    def ticks(self, axis: Axis) -> list[tuple[float, str]]:
        """Fractions of the width, and what is written there."""
        size = self._time()[0] / 3600 if axis == "hours" else 1.0
        last = self._last[axis] / size
        ticks = ticks_up_to(last, least=1.0 if axis in ("steps", "samples") else 0.0)
        labels, _ = tick_labels(ticks, FLOPS) if axis == "flops" else tick_labels(ticks)
        return [(tick / last, label) for tick, label in zip(ticks, labels, strict=True)]

    def for_script(self) -> dict[str, Any]:
        """What the script of the page needs to draw the charts over another axis."""
        return {
            "shown": self.shown,
            "axes": {
                axis: {"name": self.name(axis), "last": self._last[axis], "ticks": self.ticks(axis)} for axis in AXES
            },
            "runs": [
                {axis: [float(f"{value:.7g}") for value in run.knots[axis]] for axis in AXES} for run in self.progress
            ],
        }

    def _longest(self, axis: Axis, last_steps: Sequence[int]) -> float:
        """Where the run that is longest on this axis ends; 1 if none has begun."""
        ends = [run.at(axis, np.array([float(step)]))[0] for run, step in zip(self.progress, last_steps, strict=True)]
        return float(max(ends)) if max(ends) > 0 else 1.0

    def _time(self) -> tuple[int, str]:
        """Seconds of the unit of time, and its name."""
        seconds = 3600 * self._last["hours"]
        return next((size, name) for least, size, name in _TIMES if seconds >= least)
