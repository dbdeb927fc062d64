"""LAMB (You et al. 2020): Adam's update of each matrix, made as long as the matrix itself, for very large batches."""

from typing import Any

import torch
from torch import Tensor

from fastvit_engine.engine.optimizers import adam
from fastvit_engine.engine.optimizers.batches import in_batches
from fastvit_engine.engine.optimizers.groups import MATRICES, ParameterGroups
from fastvit_engine.engine.optimizers.partition import Held, Partition, PartitionedOptimizer


class Lamb(PartitionedOptimizer):
    """w <- w - lr * |w| / |u| * u with u = m / (sqrt(v) + eps) + weight_decay * w, the norms over a whole matrix.

    Parameters that are not decayed, such as biases, get Adam's update as it is. State: `exp_avg` and `exp_avg_sq`.
    """

    def __init__(self, groups: ParameterGroups, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, MATRICES: False})

    def update(self, group: dict[str, Any], partitions: list[Partition]) -> None:
        held, step = self.held(partitions, *adam.KINDS_OF_STATE)
        columns = (held.weights, held.gradients, *held.state.values())
        rows: list[int] = []
        norms: tuple[list[Tensor], list[Tensor]] = ([], [])
        for of_rows, (weights, gradients, averages, squares) in in_batches(*columns):
            adam.accumulate(gradients, averages, squares, group["betas"])
            if group[MATRICES]:
                rows += of_rows
                norms[0].extend(torch._foreach_norm(weights))
                norms[1].extend(torch._foreach_norm(_update(group, step, weights, averages, squares)))
        ratios = self._ratios(held, rows, norms) if group[MATRICES] else [1.0] * len(held.spans)
        for of_rows, (weights, _, averages, squares) in in_batches(*columns):
            updates = _update(group, step, weights, averages, squares)  # again: less memory than to keep it
            torch._foreach_mul_(updates, [-group["lr"] * ratios[row] for row in of_rows])
            torch._foreach_add_(weights, updates)

    def _ratios(self, held: Held, rows: list[int], norms: tuple[list[Tensor], list[Tensor]]) -> list[float]:
        """For each span the norm of its parameter over that of the update; 1 if one of them is 0."""
        number_of = {name: number for number, name in enumerate(held.names)}
        numbers = torch.tensor([number_of[held.spans[row].name] for row in rows], dtype=torch.int64)
        squares = torch.zeros(2, len(number_of), dtype=torch.float64)
        for sums, of_pieces in zip(squares, norms, strict=True):
            if of_pieces:  # added up on the host, where the order is always the same
                sums.index_add_(0, numbers, torch.stack(of_pieces).cpu().double().square())
        weight, update = self.sum_over_processes(squares).sqrt()
        ratios = torch.where((weight > 0) & (update > 0), weight / update, 1.0).tolist()
        return [ratios[number_of[span.name]] for span in held.spans]


def _update(
    group: dict[str, Any], step: int, weights: list[Tensor], averages: list[Tensor], squares: list[Tensor]
) -> list[Tensor]:
    updates = adam.direction(averages, squares, group["betas"], group["eps"], step)
    torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
    return updates
