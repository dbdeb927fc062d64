"""Multi-head attention in plain PyTorch: the CPU path and the oracle."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    dropout: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """q [B, N, H, d], k and v [B, M, H, d], or without B where sequences have different lengths -> [(B,) N, H*d]."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return attend(q, k, v, bias, dropout).flatten(-2)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs = []
    for i in range(len(ends_q) - 1):
        own_q, own_k = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        outs.append(attend(q[None, own_q], k[None, own_k], v[None, own_k], None, dropout)[0])
    outs.append(0 * q[ends_q[-1] :])  # these tokens are of no sequence
    return torch.cat(outs).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """[B, N, H, d], in float32 if the bias is."""
    dtype = q.dtype if bias is None else torch.promote_types(q.dtype, bias.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, d]
    out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), bias, dropout)
    return out.transpose(1, 2).to(v.dtype)
