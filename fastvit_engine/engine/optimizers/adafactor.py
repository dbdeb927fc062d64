"""Adafactor as Zhai et al. 2022 train large ViTs: a factored second moment, and momentum in bf16.

The average of a matrix's squared gradients is kept as the means of its rows and of its columns, so the state is 2 bytes
per parameter in place of AdamW's 8.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fastvit_engine.engine.optimizers.batches import BATCH, in_batches
from fastvit_engine.engine.optimizers.groups import APART, ParameterGroups
from fastvit_engine.engine.optimizers.partition import Held, Partition, PartitionedOptimizer
from fastvit_engine.engine.optimizers.state import matrix_shape

ROWS, COLUMNS = "exp_avg_sq_row", "exp_avg_sq_col"
_DECAY_POWER = 0.8


class Adafactor(PartitionedOptimizer):
    """w <- (1 - lr * weight_decay) * w - lr * m with m <- b1 * m + (1 - b1) * g / sqrt(v).

    v averages g^2 + eps at the rate min(b2, 1 - step^-0.8). For groups that are APART, v is the outer product of the
    means of rows and columns, `exp_avg_sq_row` and `exp_avg_sq_col`; for others it is `exp_avg_sq`.
    """

    dtypes: ClassVar[Mapping[str, torch.dtype]] = {"exp_avg": torch.bfloat16}
    statistic_kinds: ClassVar[tuple[str, ...]] = (ROWS, COLUMNS)

    def __init__(self, groups: ParameterGroups, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, APART: False})

    def statistic_shape(self, kind: str, name: str) -> list[int]:
        rows, columns = matrix_shape(self.shapes[name])
        return [rows if kind == ROWS else columns]

    def update(self, group: dict[str, Any], partitions: list[Partition]) -> None:
        kinds = ("exp_avg",) if group[APART] else ("exp_avg", "exp_avg_sq")
        held, step = self.held(partitions, *kinds)
        kept = min(group["betas"][1], 1 - step**-_DECAY_POWER)
        if group[APART]:
            self._average_factors(held, kept, group["eps"])
            for weight, gradient, momentum, scale in self._factored(held):
                _move(group, [weight], [gradient * scale], [momentum])
            return
        columns = (held.weights, held.gradients, *held.state.values())
        for _, (weights, gradients, momenta, squares) in in_batches(*columns):
            new = torch._foreach_mul(gradients, gradients)
            torch._foreach_add_(new, group["eps"])
            torch._foreach_lerp_(squares, new, 1 - kept)
            _move(group, weights, torch._foreach_div(gradients, torch._foreach_sqrt(squares)), momenta)

    def _average_factors(self, held: Held, kept: float, eps: float) -> None:
        """Adds the means of the rows and columns of each squared gradient to their averages; collective."""
        factors = [(kind, name) for name in held.names for kind in (ROWS, COLUMNS)]
        sizes = [self.statistic_shape(kind, name)[0] for kind, name in factors]
        sums = torch.zeros(sum(sizes), dtype=torch.float32, device=held.device)
        of = dict(zip(factors, sums.split(sizes), strict=True))
        for span, gradient in zip(held.spans, held.gradients, strict=True):
            columns = of[COLUMNS, span.name].numel()
            for start, (piece,) in _pieces(gradient):
                first, before = divmod(span.start + start, columns)
                square = functional.pad(piece.square() + eps, (before, -(before + piece.numel()) % columns))
                square = square.view(-1, columns)
                of[ROWS, span.name].narrow(0, first, len(square)).add_(square.sum(dim=1))
                of[COLUMNS, span.name].add_(square.sum(dim=0))
        sums = self.sum_over_processes(sums)
        for (kind, name), total in zip(factors, sums.split(sizes), strict=True):
            other = self.statistic_shape(COLUMNS if kind == ROWS else ROWS, name)[0]
            of_kind = self.statistics.setdefault(kind, {})
            if name not in of_kind:
                of_kind[name] = torch.zeros_like(total)
            of_kind[name].lerp_(total / other, 1 - kept)

    def _factored(self, held: Held) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Pieces of weights, gradients and momentum, and one over the root of the second moment of each element."""
        for span, *of_span in zip(held.spans, held.weights, held.gradients, held.state["exp_avg"], strict=True):
            rows, columns = self.statistics[ROWS][span.name], self.statistics[COLUMNS][span.name]
            of_rows, of_columns = (rows / rows.mean()).rsqrt(), columns.rsqrt()
            for start, (weights, gradients, momentum) in _pieces(*of_span):
                first, before = divmod(span.start + start, len(columns))
                last = -(-(before + weights.numel()) // len(columns)) + first
                scale = (of_rows[first:last, None] * of_columns).view(-1).narrow(0, before, weights.numel())
                yield weights, gradients, momentum, scale


def _pieces(*tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Pieces of 1-D tensors that take little memory, and where they begin."""
    for start in range(0, tensors[0].numel(), BATCH):
        yield start, tuple(tensor[start : start + BATCH] for tensor in tensors)


def _move(group: dict[str, Any], weights: list[Tensor], updates: Sequence[Tensor], momenta: list[Tensor]) -> None:
    for weight, update, momentum in zip(weights, updates, momenta, strict=True):
        momentum.lerp_(update.to(momentum.dtype), 1 - group["betas"][0])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(momentum, alpha=-group["lr"])
