"""Exponential moving average of the weights (Polyak averaging), in fp32, under every ZeRO stage."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastvit_engine.engine.protocol import ParameterSlice, TrainingEngine


class WeightAverage:
    """average <- average + (1 - d) * (weight - average) after every optimizer step.

    d = min(decay, (1 + t) / (10 + t)) at step t, so that the first weights are soon forgotten; or, with `rises_over`
    steps, d rises from `decay` to 1 along half a cosine, as that of a teacher. The weights are the fp32 masters, and
    each process averages those that it holds: its part under ZeRO, all without. Running statistics, which every process
    holds whole, are averaged by the same rule.
    """

    def __init__(self, engine: TrainingEngine, decay: float, *, rises_over: int | None = None) -> None:
        self.engine = engine
        self.decay, self.rises_over = decay, rises_over
        self.average = [part.values.clone() for part in engine.master_weights()]
        self.statistics = [part.values.clone() for part in engine.running_statistics()]

    def update(self, step: int) -> None:
        torch._foreach_lerp_(self.average, self._masters(), 1 - self.decay_at(step))
        if self.statistics:
            torch._foreach_lerp_(self.statistics, self._running(), 1 - self.decay_at(step))

    def decay_at(self, step: int) -> float:
        if self.rises_over is None:
            return min(self.decay, (1 + step) / (10 + step))
        return 1 - (1 - self.decay) * (1 + math.cos(math.pi * min(1, step / self.rises_over))) / 2

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the averaged weights inside the block, and gets its own back after it; collective."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def slices(self) -> list[ParameterSlice]:
        """The average, in slices like those of the master weights; writing to one changes the average."""
        masters = self.engine.master_weights()
        return [ParameterSlice(m.name, m.start, a) for m, a in zip(masters, self.average, strict=True)]

    def statistics_slices(self) -> list[ParameterSlice]:
        """As `slices`, of the running statistics."""
        running = self.engine.running_statistics()
        return [ParameterSlice(r.name, r.start, a) for r, a in zip(running, self.statistics, strict=True)]

    def restart(self) -> None:
        """Starts the average again from the current weights."""
        torch._foreach_copy_(self.average, self._masters())
        if self.statistics:
            torch._foreach_copy_(self.statistics, self._running())

    def _masters(self) -> list[Tensor]:
        return [part.values for part in self.engine.master_weights()]

    def _running(self) -> list[Tensor]:
        return [part.values for part in self.engine.running_statistics()]

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchanges average and masters, one slice at a time so that no whole copy is made."""
        ours, theirs = [*self.average, *self.statistics], [*self._masters(), *self._running()]
        for average, master in zip(ours, theirs, strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        self.engine.publish()
