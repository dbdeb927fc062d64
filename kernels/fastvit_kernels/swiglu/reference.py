"""LayerNorm and gated MLP: `layer_norm`, which chooses its implementation, and plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.layer_norm import layer_norm
from fastvit_kernels.residual import add_scaled


def swiglu_mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    gate, up = F.linear(x, fc1_weight, fc1_bias).chunk(2, dim=-1)  # [..., M] each
    return F.linear(F.silu(gate) * up, fc2_weight, fc2_bias)


def layer_norm_swiglu(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    eps: float,
) -> Tensor:
    normed = layer_norm(x, norm_weight, norm_bias, eps=eps)
    return add_scaled(x, swiglu_mlp(normed, fc1_weight, fc1_bias, fc2_weight, fc2_bias), layer_scale, path_scale)
