"""The attention half of a pre-norm block: a composition of operations, each of which chooses its implementation."""

import torch
from torch import Tensor

from fastvit_kernels.attention import attention, attention_qkv, relative_bias
from fastvit_kernels.fp8.op import linear
from fastvit_kernels.fp8.setting import Fp8
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
    rel_pos_embed: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    fp8: Fp8 | None = None,
) -> Tensor:
    normed = layer_norm(x, norm_weight, norm_bias, eps=eps)
    if cu_seqlens is not None:
        x, attended = attend_in_sequences(x, normed, qkv_weight, qkv_bias, heads, outputs, cu_seqlens, max_seqlen, fp8)
        branch = linear(attended, proj_weight, proj_bias, fp8, "proj")  # [1, T or S * outputs, D]
        return add_branch(x, branch, layer_scale=layer_scale, dropout=dropout, drop_path=drop_path)
    if outputs is not None:
        # The first tokens are taken once, and normalised again: gradients of parts of x and of norm(x) would both be
        # filled up with zeros.
        x = x[:, :outputs]
        first = layer_norm(x, norm_weight, norm_bias, eps=eps)
        attended = attend_from(first, normed, qkv_weight, qkv_bias, heads, rel_pos_embed, fp8)
        branch = linear(attended, proj_weight, proj_bias, fp8, "proj")  # [B, outputs, D]
        return add_branch(x, branch, layer_scale=layer_scale, dropout=dropout, drop_path=drop_path)
    qkv = linear(normed, qkv_weight, qkv_bias, fp8, "qkv").unflatten(-1, (3, heads, -1))  # [B, N, 3, H, d]
    bias = None if rel_pos_embed is None else relative_bias(qkv.select(-3, 0), rel_pos_embed)
    branch = linear(attention(qkv, bias=bias, causal=causal), proj_weight, proj_bias, fp8, "proj")  # [B, N, D]
    return add_branch(x, branch, layer_scale=layer_scale, dropout=dropout, drop_path=drop_path)


def attend_in_sequences(
    x: Tensor,
    normed: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    heads: int,
    outputs: int | None,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    fp8: Fp8 | None,
) -> tuple[Tensor, Tensor]:
    """The tokens of x [1, T, D] that the result is for, and what they see of their own sequence.

    Both are [1, T, D], or [1, S * outputs, D] of the first tokens of each sequence.
    """
    if outputs is None:
        qkv = linear(normed[0], qkv_weight, qkv_bias, fp8, "qkv").unflatten(-1, (3, heads, -1))  # [T, 3, H, d]
        return x, attention(qkv, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)[None]
    width = x.shape[-1]
    first = (cu_seqlens[:-1, None] + torch.arange(outputs, device=x.device)).flatten()  # [S * outputs]
    (q_weight, kv_weight), (q_bias, kv_bias) = (part.split([width, 2 * width]) for part in (qkv_weight, qkv_bias))
    queries = linear(normed[0].index_select(0, first), q_weight, q_bias, fp8, "qkv").unflatten(-1, (heads, -1))
    keys_values = linear(normed[0], kv_weight, kv_bias, fp8, "qkv").unflatten(-1, (2, heads, -1))  # [T, 2, H, d]
    attended = attention_qkv(
        queries,
        *keys_values.unbind(-3),
        cu_seqlens_q=outputs * torch.arange(len(cu_seqlens), dtype=torch.int32, device=x.device),
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=outputs,
        max_seqlen_k=max_seqlen,
    )
    return x.index_select(1, first), attended[None]


def attend_from(
    first: Tensor,
    tokens: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    heads: int,
    rel_pos_embed: Tensor | None,
    fp8: Fp8 | None,
) -> Tensor:
    """Queries of `first` [B, outputs, D], keys and values of all tokens [B, N, D] -> [B, outputs, D]."""
    width = tokens.shape[-1]
    q_weight, kv_weight = qkv_weight.split([width, 2 * width])
    q_bias, kv_bias = qkv_bias.split([width, 2 * width])
    queries = linear(first, q_weight, q_bias, fp8, "qkv").unflatten(-1, (heads, -1))  # [B, outputs, H, d]
    keys_values = linear(tokens, kv_weight, kv_bias, fp8, "qkv").unflatten(-1, (2, heads, -1))  # [B, N, 2, H, d]
    bias = None if rel_pos_embed is None else relative_bias(queries, rel_pos_embed)
    return attention_qkv(queries, *keys_values.unbind(-3), bias=bias)
