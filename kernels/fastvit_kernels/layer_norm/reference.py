"""Layer normalisation in plain PyTorch: the CPU path and the oracle."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.residual import add_scaled


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)  # statistics in float32, or float64 for float64 input
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    y = add_scaled(x, branch, layer_scale, path_scale)
    return y, layer_norm(y, weight, bias, eps)
