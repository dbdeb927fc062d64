"""The attention half of a pre-norm block: a composition of operations, each of which chooses its implementation."""

import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.attention import attention, attention_qkv
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
    causal: bool,
    outputs: int | None,
) -> Tensor:
    normed = layer_norm(x, norm_weight, norm_bias, eps=eps)
    if outputs is not None:
        attended = attend_from_first(normed, qkv_weight, qkv_bias, heads, outputs)
        branch = F.linear(attended, proj_weight, proj_bias)  # [B, outputs, D]
        return add_branch(x[:, :outputs], branch, layer_scale=layer_scale, dropout=dropout, drop_path=drop_path)
    qkv = F.linear(normed, qkv_weight, qkv_bias).unflatten(-1, (3, heads, -1))  # [B, N, 3, H, d]
    branch = F.linear(attention(qkv, causal=causal), proj_weight, proj_bias)  # [B, N, D]
    return add_branch(x, branch, layer_scale=layer_scale, dropout=dropout, drop_path=drop_path)


def attend_from_first(normed: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, heads: int, outputs: int) -> Tensor:
    """Queries of the first tokens, keys and values of all: [B, N, D] -> [B, outputs, D]."""
    width = normed.shape[-1]
    q_weight, kv_weight = qkv_weight.split([width, 2 * width])
    q_bias, kv_bias = qkv_bias.split([width, 2 * width])
    queries = F.linear(normed[:, :outputs], q_weight, q_bias).unflatten(-1, (heads, -1))  # [B, outputs, H, d]
    keys_values = F.linear(normed, kv_weight, kv_bias).unflatten(-1, (2, heads, -1))  # [B, N, 2, H, d]
    return attention_qkv(queries, *keys_values.unbind(-3))
