"""Muon (Jordan et al. 2024): the momentum of each hidden matrix, orthogonalized; AdamW for everything else.

The update of a matrix is scaled by 0.2 sqrt(max(rows, columns)), so that its elements are as large as AdamW's (Liu et
al. 2025): one learning rate and one weight decay serve both.

Orthogonalizing needs a whole matrix, and is the work of one process for each. The others send it their parts of the
momentum in bf16, and get back what they hold of the result. It is multiplied in bf16 too, but on a CPU in float32.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fastvit_engine.engine.optimizers import adam
from fastvit_engine.engine.optimizers.batches import in_batches
from fastvit_engine.engine.optimizers.exchange import Exchange, Matrix, Spans, plan_exchange, send
from fastvit_engine.engine.optimizers.groups import APART, ParameterGroups
from fastvit_engine.engine.optimizers.partition import Partition, PartitionedOptimizer

DTYPE = torch.bfloat16  # of the matrices that are exchanged
ROUND = 2**27  # elements of the matrices that are exchanged at a time
_MOMENTUM = "momentum_buffer"
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: as steep at 0 as one that still converges
_ITERATIONS = 5


class Muon(PartitionedOptimizer):
    """w <- (1 - lr * weight_decay) * w - lr * 0.2 sqrt(max(rows, columns)) * orthogonalized(g + momentum * (m - g)).

    m <- momentum * m + (1 - momentum) * g is computed before. Groups that are APART hold hidden matrices, whose state
    is `momentum_buffer`; the parameters of other groups get AdamW, and have `exp_avg` and `exp_avg_sq`.
    """

    def __init__(
        self, groups: ParameterGroups, lr: float, momentum: float, betas: tuple[float, float], eps: float
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0, APART: False}
        super().__init__(groups, defaults)
        self._spans: list[list[Spans]] = []  # by process and partition
        self._plans: dict[tuple[int, ...], list[tuple[list[Matrix], Exchange]]] = {}

    def attach(self, partitions: Sequence[Partition], *args: Any, **kwargs: Any) -> None:
        super().attach(partitions, *args, **kwargs)
        own: list[Spans] = [[(span.name, span.start, span.count) for span in p.spans] for p in partitions]
        self._spans = [own] * torch.distributed.get_world_size()
        if not self.replicated:
            torch.distributed.all_gather_object(self._spans, own)

    def update(self, group: dict[str, Any], partitions: list[Partition]) -> None:
        (self._update_hidden if group[APART] else self._update_rest)(group, partitions)

    def _update_rest(self, group: dict[str, Any], partitions: list[Partition]) -> None:
        held, step = self.held(partitions, *adam.KINDS_OF_STATE)
        columns = (held.weights, held.gradients, *held.state.values())
        for _, (weights, gradients, averages, squares) in in_batches(*columns):
            adam.accumulate(gradients, averages, squares, group["betas"])
            updates = adam.direction(averages, squares, group["betas"], group["eps"], step)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"])

    def _update_hidden(self, group: dict[str, Any], partitions: list[Partition]) -> None:
        held, _ = self.held(partitions, _MOMENTUM)
        momenta, momentum = held.state[_MOMENTUM], group["momentum"]
        for _, (gradients, averages) in in_batches(held.gradients, momenta):
            torch._foreach_lerp_(averages, gradients, 1 - momentum)
        for matrices, exchange in self._exchanges(partitions):
            ahead = [  # Nesterov's momentum
                torch.lerp(
                    held.gradients[f.span].narrow(0, f.offset, f.count),
                    momenta[f.span].narrow(0, f.offset, f.count),
                    momentum,
                ).to(self.device, DTYPE)
                for f in exchange.own
            ]
            updates = self._orthogonalized(matrices, exchange, ahead)
            for fragment, update in zip(exchange.own, updates, strict=True):
                matrix = matrices[fragment.matrix]
                rate = group["lr"] * 0.2 * math.sqrt(max(matrix.rows, matrix.columns))
                weights = held.weights[fragment.span].narrow(0, fragment.offset, fragment.count)
                weights.mul_(1 - group["lr"] * group["weight_decay"])
                weights.add_(update.to(weights.device, torch.float32), alpha=-rate)

    def _exchanges(self, partitions: Sequence[Partition]) -> list[tuple[list[Matrix], Exchange]]:
        """The exchanges that update these partitions, one round after the other."""
        positions = {id(partition): position for position, partition in enumerate(self._partitions)}
        key = tuple(positions[id(partition)] for partition in partitions)
        if key not in self._plans:
            names = [name for partition in partitions for name in partition.names]
            matrices = [matrix for name in names for matrix in matrices_of(name, self.shapes[name])]
            spans = [[span for position in key for span in of_process[position]] for of_process in self._spans]
            rank = torch.distributed.get_rank()
            self._plans[key] = [
                (together, plan_exchange(together, spans, rank, replicated=self.replicated))
                for together in rounds(matrices, len(spans))
            ]
        return self._plans[key]

    def _orthogonalized(self, matrices: Sequence[Matrix], exchange: Exchange, parts: Sequence[Tensor]) -> list[Tensor]:
        """The fragments of the orthogonalized matrices that this process holds; parts: those of the matrices."""
        lent = [[parts[i] for i in of_process] for of_process in exchange.lent]
        sizes = [[fragment.count for fragment in of_process] for of_process in exchange.collected]
        whole = {
            number: torch.empty(matrices[number].size, dtype=DTYPE, device=self.device) for number in exchange.owned
        }
        for fragments, tensors in zip(exchange.collected, send(lent, sizes, DTYPE, self.device), strict=True):
            for f, tensor in zip(fragments, tensors, strict=True):
                whole[f.matrix].narrow(0, f.start, f.count).copy_(tensor)
        for numbers in alike(matrices, exchange.owned):
            shape = matrices[numbers[0]].rows, matrices[numbers[0]].columns
            results = orthogonalize(torch.stack([whole[number].view(shape) for number in numbers]))
            whole |= {number: result.reshape(-1) for number, result in zip(numbers, results, strict=True)}
        returned = [[whole[f.matrix].narrow(0, f.start, f.count) for f in of] for of in exchange.returned]
        sizes = [[exchange.own[i].count for i in of_process] for of_process in exchange.received]
        updates: dict[int, Tensor] = {}
        for indices, tensors in zip(exchange.received, send(returned, sizes, DTYPE, self.device), strict=True):
            updates |= dict(zip(indices, tensors, strict=True))
        return [updates[i] for i in range(len(exchange.own))]


def matrices_of(name: str, shape: Sequence[int]) -> list[Matrix]:
    """The matrices in a parameter: query, key and value are three, although one product computes them."""
    rows, columns = shape
    parts = 3 if name.endswith(".qkv.weight") else 1
    rows //= parts
    return [Matrix(name, part * rows * columns, rows, columns) for part in range(parts)]


def rounds(matrices: Sequence[Matrix], processes: int, most: int = ROUND) -> Iterator[list[Matrix]]:
    """The matrices, at most about `most` elements at a time, but enough for every process to have work."""
    most = max(most, processes * max((matrix.size for matrix in matrices), default=0))
    together: list[Matrix] = []
    for matrix in matrices:
        if sum(m.size for m in together) + matrix.size > most:
            yield together
            together = []
        together.append(matrix)
    if together:
        yield together


def alike(matrices: Sequence[Matrix], numbers: Sequence[int]) -> Iterator[list[int]]:
    """The numbers of matrices of the same shape, which are multiplied at once, at most ROUND / 8 elements."""

    def shape(number: int) -> tuple[int, int]:
        return matrices[number].rows, matrices[number].columns

    for (rows, columns), same in groupby(sorted(numbers, key=shape), key=shape):
        together, found = max(1, ROUND // 8 // (rows * columns)), list(same)
        for first in range(0, len(found), together):
            yield found[first : first + together]


def orthogonalize(matrices: Tensor) -> Tensor:
    """[k, rows, columns] -> the same in DTYPE, with singular values between about 0.7 and 1.2 (Newton-Schulz)."""
    # A CPU without instructions for bf16 multiplies 30 times as fast in float32.
    dtype = torch.float32 if matrices.device.type == "cpu" else DTYPE
    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = (x / norms.clamp(min=1e-7)).to(dtype)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(DTYPE)
