"""LayerNorm and two-layer MLP: `layer_norm`, which chooses its implementation, and plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.fp8.op import linear
from fastvit_kernels.fp8.setting import Fp8
from fastvit_kernels.layer_norm import layer_norm
from fastvit_kernels.residual import add_branch

GELU_FORM = {"gelu": "none", "gelu_tanh": "tanh"}  # activation -> `approximate` of F.gelu


def layer_norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float,
    activation: str,
    layer_scale: Tensor | None,
    dropout: float,
    drop_path: float,
    fp8: Fp8 | None = None,
) -> Tensor:
    normed = layer_norm(x, norm_weight, norm_bias, eps=eps)
    added = branch(normed, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, dropout, fp8)
    return add_branch(x, added, layer_scale=layer_scale, dropout=dropout, drop_path=drop_path)


def branch(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    activation: str,
    dropout: float,
    fp8: Fp8 | None = None,
) -> Tensor:
    """The two layers: [..., D] -> [..., K]."""
    hidden = linear(x, fc1_weight, fc1_bias, fp8, "fc1")  # [..., M]
    hidden = F.gelu(hidden, approximate=GELU_FORM[activation])
    if dropout > 0:
        hidden = F.dropout(hidden, dropout)
    return linear(hidden, fc2_weight, fc2_bias, fp8, "fc2")
