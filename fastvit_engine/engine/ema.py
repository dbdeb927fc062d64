"""Exponential moving average of the weights (Polyak averaging), in fp32, under every ZeRO stage."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastvit_engine.engine.deepspeed import EngineState, Piece


class WeightAverage:
    """average <- average + (1 - d) * (weight - average) after every optimizer step.

    d = min(decay, (1 + t) / (10 + t)) at step t, so that the first weights are soon forgotten. The weights are the fp32
    masters, and each process averages those that it holds: its part under ZeRO, all without.
    """

    def __init__(self, state: EngineState, decay: float) -> None:
        self.state = state
        self.decay = decay
        self.average = [piece.values.clone() for piece in state.master_weights()]

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

    def pieces(self) -> list[Piece]:
        """The average, cut as the masters are; writing into it changes the average."""
        masters = self.state.master_weights()
        return [Piece(m.name, m.start, a) for m, a in zip(masters, self.average, strict=True)]

    def restart(self) -> None:
        """Begins anew, from the weights as they are."""
        torch._foreach_copy_(self.average, self._masters())

    def _masters(self) -> list[Tensor]:
        return [piece.values for piece in self.state.master_weights()]

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchanges average and masters, one piece at a time so that no whole copy is made."""
        for average, master in zip(self.average, self._masters(), strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        self.state.publish()
