"""How long the runs of a study take: by an assumption at first, and by measurement once a run is finished."""

from collections.abc import Sequence

import torch

from fastvit_engine.cores import core_share
from fastvit_engine.observe.units import format_duration, format_share
from fastvit_engine.sizing.gpus import DATASHEET_PEAK, USUAL_MFU, known_gpu
from fastvit_engine.study.planning import PlannedRun
from fastvit_engine.train.throughput import core_peak_flops

_CPU_MFU = 0.2  # an assumption: cifar10_cpu had 0.2 to 0.3 on a machine at rest
_BESIDES = 25.0  # seconds of a run that are not training: it starts, evaluates, writes its weights; an assumption


class Pace:
    """How fast this machine trains the runs of a study."""

    def __init__(self, processes: int) -> None:
        self._runs, self._flops, self._seconds, self._besides = 0, 0.0, 0.0, 0.0
        self._processes = processes

    def measure(self, flops: float, train_seconds: float, seconds: float) -> None:
        """A run has computed so many operations in its training time, and its last command took `seconds`."""
        self._runs += 1
        self._flops += flops
        self._seconds += train_seconds
        self._besides += max(0.0, seconds - train_seconds)

    def describe(self, runs: Sequence[PlannedRun]) -> str:
        """How long runs take, as a clause."""
        flops = sum(run.computed_flops for run in runs)
        if self._runs:
            return f"about {format_duration(self._expected(flops, len(runs)))}, as the runs before took"
        if (found := self._assumed()) is None:
            return "for a time that the first run will tell"
        seconds = flops / found[0] + len(runs) * _BESIDES
        return f"about {format_duration(seconds)}, {found[1]}: an assumption until a run is finished"

    def left(self, runs: Sequence[PlannedRun]) -> str:
        """The time that the rest takes, by what is measured; "" if there is no rest."""
        if not runs or not self._runs:
            return ""
        flops = sum(run.computed_flops for run in runs)
        return f"about {format_duration(self._expected(flops, len(runs)))} left"

    def _expected(self, flops: float, runs: int) -> float:
        return flops * self._seconds / self._flops + runs * self._besides / self._runs

    def _assumed(self) -> tuple[float, str] | None:
        """Operations per second before anything is measured, and the assumption; None on a GPU of no table."""
        besides = f"and {_BESIDES:.0f} s of each run are start and evaluation"
        if torch.cuda.is_available():
            gpu = known_gpu(torch.cuda.get_device_name())
            if gpu is None:
                return None
            peak = DATASHEET_PEAK[gpu] * self._processes
            return USUAL_MFU * peak, f"if MFU is {format_share(USUAL_MFU)} of {self._processes} x {gpu} {besides}"
        peak = core_peak_flops(torch.float32) * core_share()
        return _CPU_MFU * peak, f"if MFU is {format_share(_CPU_MFU)} of this CPU's measured peak {besides}"
