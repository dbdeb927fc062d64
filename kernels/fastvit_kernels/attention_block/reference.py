"""The attention half of a pre-norm block: a composition of operations, each of which chooses its implementation."""

import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.attention import attention
from fastvit_kernels.layer_norm import layer_norm
from fastvit_kernels.residual import add_branch


def attention_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    heads: int,
    eps: float,
    layer_scale: Tensor | None,
    dropout: float,
    drop_path: float,
    causal: bool = False,
) -> Tensor:
    normed = layer_norm(x, norm_weight, norm_bias, eps=eps)
    qkv = F.linear(normed, qkv_weight, qkv_bias).unflatten(-1, (3, heads, -1))  # [B, N, 3, H, d]
    branch = F.linear(attention(qkv, causal=causal), proj_weight, proj_bias)  # [B, N, D]
    return add_branch(x, branch, layer_scale=layer_scale, dropout=dropout, drop_path=drop_path)
