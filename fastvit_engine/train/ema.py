"""Exponential moving average of the weights (Polyak averaging), in fp32, under every ZeRO stage."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


class WeightAverage:
    """average <- average + (1 - d) * (weight - average) after every optimizer step.

    d = min(decay, (1 + t) / (10 + t)) at step t, so that the first weights are soon forgotten. Under ZeRO-3 each
    process averages only the part of each parameter that it owns; otherwise every process holds the whole average.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine = engine
        self.decay = decay
        self.sharded = engine.zero_optimization_stage() == 3
        self.parameters = list(engine.module.parameters())
        self.names = [name for name, _ in engine.module.named_parameters()]
        self.average = [self._local(parameter).detach().float().clone() for parameter in self.parameters]

    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [self._local(parameter).detach().to(average) for parameter, average in self._pairs()]
        torch._foreach_lerp_(self.average, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the averaged weights inside the block, and gets its own back after it; collective."""
        own = [self._local(parameter).detach().clone() for parameter in self.parameters]
        self._write(self.average)
        try:
            yield
        finally:
            self._write(own)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.average, strict=True))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in zip(self.names, self.average, strict=True):
            average.copy_(state[name])

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return zip(self.parameters, self.average, strict=True)

    def _local(self, parameter: nn.Parameter) -> Tensor:
        return cast(Any, parameter).ds_tensor if self.sharded else parameter.data

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        if self.sharded:  # small parameters stay gathered between steps: drop those copies, they would be stale
            for parameter in self.parameters:
                if parameter.ds_status.name == "AVAILABLE":
                    parameter.partition()
        for parameter, value in zip(self.parameters, values, strict=True):
            self._local(parameter).copy_(value)
        if self.sharded and self.engine.optimizer.persistent_parameters:
            self.engine.optimizer.persistent_parameters[0].all_gather(self.engine.optimizer.persistent_parameters)
        if self.sharded:
            self.engine.optimizer.invalidate_secondary_tensor()  # hpZ's copies within the node are stale too
