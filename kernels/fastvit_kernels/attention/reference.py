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
    outs, places = [], []
    for rows_q, rows_k in alike(cu_seqlens_q, cu_seqlens_k):  # [n, N] and [n, M]
        own_q, own_k, own_v = taken(q, rows_q), taken(k, rows_k), taken(v, rows_k)
        outs.append(attend(own_q, own_k, own_v, masked(None, own_q, own_k, causal), dropout, scale).flatten(0, 1))
        places.append(rows_q.flatten())
    rest = torch.arange(sum(map(len, outs)), len(q), device=q.device)  # these tokens are of no sequence
    outs.append(0 * q[len(q) - len(rest) :])
    return torch.cat(outs).index_select(0, torch.cat([*places, rest]).argsort()).flatten(-2)


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


def taken(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [n, N] of x [T, H, d]: [n, N, H, d]."""
    return x.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def alike(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of n sequences of the same lengths, int64 [n, N] of queries and [n, M] of keys, for all that differ."""
    lengths: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for own_q, own_k in sequences(cu_seqlens_q, cu_seqlens_k):
        own = own_q.stop - own_q.start, own_k.stop - own_k.start
        lengths.setdefault(own, []).append((own_q.start, own_k.start))
    for (queries, keys), starts in lengths.items():
        first_q, first_k = torch.tensor(starts, device=cu_seqlens_q.device).T[:, :, None]  # [n, 1] each
        yield (
            first_q + torch.arange(queries, device=first_q.device),
            first_k + torch.arange(keys, device=first_k.device),
        )


def sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """The tokens of each sequence, of queries and of keys."""
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(ends_q) - 1):
        yield slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
