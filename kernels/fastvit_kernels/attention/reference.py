"""Multi-head attention in plain PyTorch: the CPU path and the oracle."""

from collections.abc import Iterator

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
    scale: float,
    causal: bool,
) -> Tensor:
    """q [B, N, H, d], k and v [B, M, H, d], or without B if sequences have different lengths -> [(B,) N, H*d]."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return attend(q, k, v, masked(bias, q, k, causal), dropout, scale).flatten(-2)
    outs = []
    for own_q, own_k in sequences(cu_seqlens_q, cu_seqlens_k):
        one = q[None, own_q], k[None, own_k], v[None, own_k]
        outs.append(attend(*one, masked(None, *one[:2], causal), dropout, scale)[0])
    outs.append(0 * q[sum(map(len, outs)) :])  # these tokens are of no sequence
    return torch.cat(outs).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float, scale: float) -> Tensor:
    """[B, N, H, d], in float32 if the bias is."""
    dtype = q.dtype if bias is None else torch.promote_types(q.dtype, bias.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, d]
    out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), bias, dropout, scale=scale)
    return out.transpose(1, 2).to(v.dtype)


def masked(bias: Tensor | None, q: Tensor, k: Tensor, causal: bool) -> Tensor | None:
    """The bias, with -inf for keys that a query must not see: the last query sees all, as in flash-attn."""
    if not causal:
        return bias
    queries, keys = q.shape[1], k.shape[1]
    unseen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
    return q.new_zeros(1).masked_fill(unseen, -torch.inf) if bias is None else bias.masked_fill(unseen, -torch.inf)


def log_sum_exp(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """Of the scores of each query, [B, H, N] or [H, T] float32; inf if it sees no key."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        scores = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) * scale
        bias = masked(bias, q, k, causal)
        lse = (scores if bias is None else scores + bias).logsumexp(dim=-1)
        return lse.masked_fill(lse == -torch.inf, torch.inf)
    lse = q.new_full(q.shape[1::-1], torch.inf, dtype=torch.float32)
    for own_q, own_k in sequences(cu_seqlens_q, cu_seqlens_k):
        lse[:, own_q] = log_sum_exp(q[None, own_q], k[None, own_k], None, None, None, scale, causal)[0]
    return lse


def sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """The tokens of each sequence, of queries and of keys."""
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(ends_q) - 1):
        yield slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
