"""Lion (Chen et al. 2023): the sign of an average of gradients, so every weight moves by the learning rate."""

from typing import Any

import torch
from torch.optim import Optimizer

from fastvit_engine.engine.optimizers.batches import in_batches
from fastvit_engine.engine.optimizers.closure import loss_of
from fastvit_engine.engine.optimizers.groups import ParameterGroups


class Lion(Optimizer):
    """w <- (1 - lr * weight_decay) * w - lr * sign(b1 * m + (1 - b1) * g), then m <- b2 * m + (1 - b2) * g.

    One number of state per parameter, `exp_avg`. Each element is computed by itself.
    """

    def __init__(self, groups: ParameterGroups, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = loss_of(closure)
        for group in self.param_groups:
            rate, decay, (first, second) = group["lr"], group["weight_decay"], group["betas"]
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            for tensor in tensors:
                if "exp_avg" not in self.state[tensor]:
                    self.state[tensor]["exp_avg"] = torch.zeros_like(tensor)
            flat = (
                [tensor.detach().view(-1) for tensor in tensors],
                [tensor.grad.reshape(-1) for tensor in tensors],
                [self.state[tensor]["exp_avg"].view(-1) for tensor in tensors],
            )
            for _, (weights, gradients, averages) in in_batches(*flat):
                torch._foreach_mul_(weights, 1 - rate * decay)
                updates = torch._foreach_lerp(averages, gradients, 1 - first)
                torch._foreach_sign_(updates)
                torch._foreach_add_(weights, updates, alpha=-rate)
                torch._foreach_lerp_(averages, gradients, 1 - second)
        return loss
