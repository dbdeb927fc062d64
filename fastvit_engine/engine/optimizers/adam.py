"""Adam's averages and its update, on lists of tensors; without weight decay."""

import math

import torch
from torch import Tensor

KINDS_OF_STATE = ("exp_avg", "exp_avg_sq")


def accumulate(
    gradients: list[Tensor], averages: list[Tensor], squares: list[Tensor], betas: tuple[float, float]
) -> None:
    """Adds the gradients to the moving averages of themselves and of their squares."""
    torch._foreach_lerp_(averages, gradients, 1 - betas[0])
    torch._foreach_mul_(squares, betas[1])
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - betas[1])


def direction(
    averages: list[Tensor], squares: list[Tensor], betas: tuple[float, float], eps: float, step: int
) -> list[Tensor]:
    """What step number `step` (from 1) subtracts from the weights at a learning rate of 1."""
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_div_(denominators, math.sqrt(1 - betas[1] ** step))
    torch._foreach_add_(denominators, eps)
    updates = torch._foreach_div(averages, denominators)
    torch._foreach_div_(updates, 1 - betas[0] ** step)
    return list(updates)
