"""Batch normalisation by the samples of all processes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Sum = Callable[[Tensor], Tensor]  # in place, over all processes; collective

_EPS = 1e-5


class BatchNorm(nn.Module):
    """Normalises each feature by its mean and variance (Ioffe and Szegedy 2015): floating [V, B, D] -> the same.

    Both are over the samples that count, of all processes, and of each of V views by itself. There are no running
    averages: a model that has learned, or a teacher, is normalised by its own batch, too.
    """

    def __init__(self, width: int, *, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor, counted: Tensor, add_up: Sum) -> Tensor:
        """counted: float32 [B, 1], 1 for a sample that counts and 0 for another. Computes in float32."""
        count = add_up(counted.sum()).clamp(min=1)
        values = x.float()
        centred = values - sum_of_processes((counted * values).sum(1, keepdim=True), add_up) / count
        variance = sum_of_processes((counted * centred.square()).sum(1, keepdim=True), add_up) / count  # [V, 1, D]
        normalised = centred * (variance + _EPS).rsqrt()
        if self.weight is not None and self.bias is not None:
            normalised = normalised * self.weight + self.bias
        return normalised.to(x.dtype)


def sum_of_processes(values: Tensor, add_up: Sum) -> Tensor:
    """The sum of a tensor over all processes, through which gradients flow: to each, the sum of those of all."""
    total: Tensor = _SumOfProcesses.apply(values, add_up)
    return total


class _SumOfProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, add_up: Sum) -> Tensor:
        ctx.add_up = add_up
        return add_up(values.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.add_up(gradients[0].clone(memory_format=torch.contiguous_format)), None
