"""The check between gradient and update: a step that training must not continue from changes nothing.

The engine asks the guard before each update, when the gradients are reduced and their norm is known. The guard adds up
one small vector over all processes (the loss, the norm, a flag), so that all of them read the same numbers and reach
the same verdict; reading it is the one wait for the device in a step. If the verdict is bad, the update is not
approved: weights and optimizer state stay as they are, and the engine ends the step as always.

If a gradient is not finite, some engines discard the step themselves, without asking; then the verdict is made when the
report is asked for. With fp16 that is an everyday event and no anomaly: the loss scale was too high, and the loss
scaler lowers it.

A spike is a value above median + spike_threshold * max(MAD, floor) of the last `spike_window` steps, where MAD is the
median distance from the median. Median and MAD do not move when a few steps are wild. For normally distributed values
the default of 20 lies 13 standard deviations above the median; the floors are there for curves that are nearly flat:
0.05 for the loss, so that nothing below 1 nat above the median is a spike, and half the median for the gradient norm,
which has heavy tails and is clipped anyway, so that nothing below 11 times the median is.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvit_engine.config import HealthConfig
from fastvit_engine.distributed.world import World
from fastvit_engine.engine.protocol import GradientNorm, TrainingEngine

_LOSS_FLOOR = 0.05  # nats
_NORM_FLOOR = 0.5  # of the median


class Anomaly(NamedTuple):
    """Why training must not continue from here, as every process sees it."""

    kind: str  # "loss", "gradient", "loss spike", "gradient spike", "weights" or "replicas"
    message: str  # "the loss is nan"
    limit: float | None = None  # of a spike: the highest value that is none
    ranks: tuple[int, ...] = ()  # at fault, if the check itself says so
    parameters: tuple[str, ...] = ()  # at fault, likewise


class StepReport(NamedTuple):
    """What all processes know of a step, from one small sum over them."""

    loss: float  # mean over the global batch
    grad_norm: float  # before clipping; inf if the engine discarded the step
    flags: float  # sum of what each process had put into `Guard.flag`
    anomaly: Anomaly | None  # then the step has changed nothing
    counts: tuple[float, ...] = ()  # sums of what `Guard.count` gave on each process


class Guard:
    """Looks at each step before its update, see above.

    `flag` is a number that any part of a process may set between steps to tell all processes at the end of the next
    one, without a collective of its own (1.0: this process was asked to stop). It stays set until it is set again.
    """

    def __init__(self, engine: TrainingEngine, world: World, health: HealthConfig, precision: str) -> None:
        self.world, self.health, self.precision = world, health, precision
        self.flag = 0.0
        self.count: Callable[[], Tensor] | None = None  # further numbers to add up, float64 on the device
        self.recent: deque[tuple[float, float]] = deque(maxlen=health.spike_window)  # (loss, norm) of healthy steps
        self._loss = torch.zeros((), device=world.device)
        self._fault: Anomaly | None = None
        self._rehearsal = False
        self._report: StepReport | None = None
        engine.approve_updates(self._approve)

    def forget(self, recent: Sequence[Sequence[float]]) -> None:
        """Training starts, or goes back to where these were the losses and norms of the last steps."""
        self.recent.clear()
        self.recent.extend((loss, norm) for loss, norm in recent)

    def expect(self, loss: Tensor, *, fault: Anomaly | None = None, rehearsal: bool = False) -> None:
        """The next call of `engine.step` is the update of a step with this loss (a scalar of this process).

        `fault`: what another check, alike on all processes, has found. `rehearsal`: nothing is updated in any case.
        """
        self._loss, self._fault, self._rehearsal, self._report = loss, fault, rehearsal, None

    def report(self) -> StepReport:
        """What was found, once `engine.step` has returned; collective."""
        if self._report is None:  # the engine discarded the step
            self._judge(math.inf)
        report = self._report
        assert report is not None
        if report.anomaly is None and not self._rehearsal and math.isfinite(report.grad_norm):
            self.recent.append((report.loss, report.grad_norm))
        return report

    def _approve(self, norm: GradientNorm) -> bool:
        if self._report is None:  # the first question about this update
            self._judge(norm)
        assert self._report is not None
        return self._report.anomaly is None and not self._rehearsal

    def _judge(self, norm: GradientNorm) -> None:
        own = [torch.as_tensor(v, dtype=torch.float64, device=self.world.device) for v in (self._loss, norm, self.flag)]
        vector = torch.stack([value.reshape(()) for value in own])
        if self.count is not None:
            vector = torch.cat([vector, self.count()])
        loss, mean_norm, flags, *counts = self.world.sum(vector).tolist()
        loss, mean_norm = loss / self.world.size, mean_norm / self.world.size
        anomaly = self._fault or self._find(loss, mean_norm)
        self._report = StepReport(loss, mean_norm, flags, anomaly, tuple(counts))

    def _find(self, loss: float, norm: float) -> Anomaly | None:
        if not math.isfinite(loss):
            return Anomaly("loss", f"the loss is {loss}")
        if not math.isfinite(norm):
            overflow = self.precision == "fp16"
            return None if overflow else Anomaly("gradient", "the gradients are not finite")
        threshold = self.health.spike_threshold
        if threshold is None or len(self.recent) < self.health.spike_window:
            return None
        values = np.array(self.recent)  # [steps, 2]
        median = np.median(values, axis=0)
        spread = np.maximum(np.median(np.abs(values - median), axis=0), [_LOSS_FLOOR, _NORM_FLOOR * median[1]])
        limits = (median + threshold * spread).tolist()
        for kind, name, value, limit, usual in zip(
            ("loss spike", "gradient spike"), ("loss", "gradient norm"), (loss, norm), limits, median, strict=True
        ):
            if value > limit:
                return Anomaly(
                    kind,
                    f"the {name} is {value:.4g}, over the limit of {limit:.4g} (median of the last {len(values)} "
                    f"steps: {usual:.4g})",
                    limit,
                )
        return None
