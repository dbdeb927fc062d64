"""What a module owes to DeepSpeed ZeRO-3 if its forward reads the parameters of children that it does not call."""

from typing import Any

import torch
from torch import Tensor, nn


class GatheredWhole(nn.Module):
    """A module whose whole subtree is gathered when it is called: a leaf, in the words of DeepSpeed.

    DeepSpeed reduces the gradients of a leaf in a full backward hook. PyTorch fires such a hook before the module's own
    backward pass if no input needs a gradient, as in the first block above frozen ones. A module with a backward hook
    and something to learn therefore gets an input that needs one; the gradient goes nowhere.
    """

    _z3_leaf = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            self._backward_hooks
            and torch.is_grad_enabled()
            and not any(map(needs_gradient, (*args, *kwargs.values())))
            and any(parameter.requires_grad for parameter in self.parameters())
        ):
            args = tuple(map(with_gradient, args))
            kwargs = {name: with_gradient(value) for name, value in kwargs.items()}
        return super().__call__(*args, **kwargs)


def needs_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def with_gradient(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
