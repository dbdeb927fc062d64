"""Exponential moving average of the weights (Polyak averaging), in fp32, under every ZeRO stage."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastvit_engine.engine.protocol import ParameterSlice, TrainingEngine


class WeightAverage:
    """average <- average + (1 - d) * (weight - average) after every optimizer step.

    d = min(decay, (1 + t) / (10 + t)) at step t, so that the first weights are soon forgotten. The weights are the fp32
    masters, and each process averages those that it holds: its part under ZeRO, all without.
    """

    def __init__(self, engine: TrainingEngine, decay: float) -> None:
        self.engine = engine
        self.decay = decay
        self.average = [part.values.clone() for part in engine.master_weights()]

    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self._masters(), 1 - decay)

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

    def restart(self) -> None:
        """Starts the average again from the current weights."""
        torch._foreach_copy_(self.average, self._masters())

    def _masters(self) -> list[Tensor]:
        return [part.values for part in self.engine.master_weights()]

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchanges average and masters, one slice at a time so that no whole copy is made."""
        for average, master in zip(self.average, self._masters(), strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        self.engine.publish()
