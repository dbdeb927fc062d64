"""Multi-head self-attention in plain PyTorch: the CPU path and the oracle."""

import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.layer_norm.reference import layer_norm
from fastvit_kernels.residual import add_branch


def attention(qkv: Tensor, dropout: float) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # [B, H, N, d]
    return out.transpose(1, 2).flatten(2)  # [B, N, H*d]


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
) -> Tensor:
    qkv = F.linear(layer_norm(x, norm_weight, norm_bias, eps), qkv_weight, qkv_bias)  # [B, N, 3*D]
    mixed = attention(qkv.unflatten(-1, (3, heads, -1)), dropout=0.0)  # [B, N, D]
    branch = F.linear(mixed, proj_weight, proj_bias)  # [B, N, D]
    return add_branch(x, branch, layer_scale=layer_scale, dropout=dropout, drop_path=drop_path)
