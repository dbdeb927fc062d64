"""The closure that PyTorch's optimizers may be given."""

from collections.abc import Callable
from typing import Any

import torch


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What a closure returns, which computes the loss and its gradients again; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
