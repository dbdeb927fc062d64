"""The public attention functions and their checks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastvit_kernels.attention import providers, reference
from fastvit_kernels.attention.launch import Call, attention_op
from fastvit_kernels.attention.tiling import MAX_HEAD_DIM
from fastvit_kernels.checks import check_device, check_floating, check_parameter, check_rate
from fastvit_kernels.dispatch import asked_for, gpu, provider
from fastvit_kernels.table import Runs


def attention(
    qkv: Tensor,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    causal: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    return_lse: bool = False,
) -> Any:
    """Multi-head self-attention softmax(scale * q k^T + bias) v of packed q, k and v (Vaswani et al. 2017).

    Args:
        qkv: [B, N, 3, H, d], any floating dtype: the output of one linear layer of width 3*H*d, unflattened. With
            `cu_seqlens` [T, 3, H, d]: sequences of different lengths, concatenated.
        bias: broadcastable to [B, H, N, N], the dtype of qkv or float32. -inf keeps a query from a key; a query that
            sees no key has an output and gradients of 0.
        dropout: rate at which attention probabilities are dropped; active whenever above 0.
        scale: of scores; None is 1 / sqrt(d).
        causal: a token sees itself and those before it only.
        cu_seqlens: [S + 1] int32 on the device of qkv: 0, then the end of each of S sequences; some may be empty.
            Tokens after the last end belong to no sequence: their output and gradients are 0.
        max_seqlen: length of the longest sequence, required with `cu_seqlens`. A smaller number only costs speed.
        return_lse: also return the logarithm of each softmax's denominator.

    Returns [B, N, H*d], or [T, H*d], in the dtype of qkv. With `return_lse` also log(sum(exp(scale * q k^T + bias))) of
    each query, [B, H, N] or [H, T] float32, without a gradient: inf for a query that sees no key. Raises ValueError for
    a wrong shape, device, rate or combination, TypeError for a wrong dtype. d above 128 runs the reference, or raises
    RuntimeError if FASTVIT_KERNELS=triton.
    """
    check_floating("qkv", qkv)
    if cu_seqlens is None and (qkv.ndim != 5 or qkv.shape[2] != 3):
        raise ValueError(f"qkv must have shape [B, N, 3, H, d], got {list(qkv.shape)}")
    if cu_seqlens is not None and (qkv.ndim != 4 or qkv.shape[1] != 3):
        raise ValueError(f"qkv must have shape [T, 3, H, d] with cu_seqlens, got {list(qkv.shape)}")
    check_lengths("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, like=qkv)
    check_rate("dropout", dropout)
    tokens, heads = qkv.shape[-4], qkv.shape[-2]
    bias = checked_bias(bias, [len(qkv), heads, tokens, tokens], cu_seqlens, like=qkv)
    plain = Call(qkv, bias=bias, cu_seqlens_q=cu_seqlens, scale=scale, causal=causal).plain and dropout == 0
    if uses_operator(qkv, tokens, plain):
        seed = draw_seed(dropout, like=qkv)
        lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
        out, lse = attention_op(*Call(qkv, None, None, bias, seed, dropout, *lengths, scale, causal))
        return results(out, lse, return_lse)
    q, k, v = qkv.unbind(-3)
    return by_reference(q, k, v, bias, dropout, cu_seqlens, cu_seqlens, scale, causal, return_lse=return_lse)


def attention_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Any:
    """`attention` of separate q, k and v, such as normalised ones, or queries of one sequence and keys of another.

    Args:
        q: [B, N, H, d], any floating dtype; with `cu_seqlens_q` [T, H, d].
        k, v: [B, M, H, d], the dtype of q; with `cu_seqlens_k` [U, H, d].
        bias: broadcastable to [B, H, N, M], the dtype of q or float32.
        dropout: rate at which attention probabilities are dropped.
        scale, return_lse: as in `attention`.
        causal: the last query sees all keys, the one before it all but the last, and so on; with more queries than
            keys, the first ones see none. So does flash-attn from version 2.1 on.
        cu_seqlens_q, max_seqlen_q: the sequences of q, see `attention`.
        cu_seqlens_k, max_seqlen_k: as many sequences of k and v.

    Returns [B, N, H*d], or [T, H*d], in the dtype of q; 0 for queries without keys. Errors as in `attention`.
    """
    check_floating("q", q)
    if q.ndim != (4 if cu_seqlens_q is None else 3):
        expected = "[B, N, H, d]" if cu_seqlens_q is None else "[T, H, d] with cu_seqlens_q"
        raise ValueError(f"q must have shape {expected}, got {list(q.shape)}")
    keys = k.shape[-3] if k.ndim == q.ndim else 0
    check_parameter("k", k, [*q.shape[:-3], keys, *q.shape[-2:]], like=q)
    check_parameter("v", v, k.shape, like=q)
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be given together")
    check_lengths("cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, like=q)
    check_lengths("cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, like=q)
    if cu_seqlens_q is not None and cu_seqlens_k is not None and len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have the same length, got {len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
        )
    check_rate("dropout", dropout)
    bias = checked_bias(bias, [len(q), q.shape[-2], q.shape[-3], keys], cu_seqlens_q, like=q)
    plain = Call(q, bias=bias, cu_seqlens_q=cu_seqlens_q, scale=scale, causal=causal).plain and dropout == 0
    if uses_operator(q, q.shape[-3], plain):
        seed = draw_seed(dropout, like=q)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = attention_op(*Call(q, k, v, bias, seed, dropout, *lengths, scale, causal))
        return results(out, lse, return_lse)
    return by_reference(q, k, v, bias, dropout, cu_seqlens_q, cu_seqlens_k, scale, causal, return_lse=return_lse)


def results(out: Tensor, base_2_lse: Tensor, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    return (out, base_2_lse * math.log(2)) if return_lse else out


def by_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    dropout: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float | None,
    causal: bool,
    *,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = reference.attention(q, k, v, bias, dropout, cu_seqlens_q, cu_seqlens_k, scale, causal)
    if not return_lse:
        return out
    return out, reference.log_sum_exp(q.detach(), k.detach(), bias, cu_seqlens_q, cu_seqlens_k, scale, causal)


def check_lengths(name: str, cu_seqlens: Tensor | None, max_name: str, max_seqlen: int | None, *, like: Tensor) -> None:
    if (cu_seqlens is None) != (max_seqlen is None):
        raise ValueError(f"{name} and {max_name} must be given together")
    if cu_seqlens is None:
        return
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"{name} must have shape [S + 1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be torch.int32, got {cu_seqlens.dtype}")
    check_device(name, cu_seqlens, like=like)


def checked_bias(bias: Tensor | None, full: list[int], cu_seqlens: Tensor | None, *, like: Tensor) -> Tensor | None:
    """The bias as a view [B or 1, H or 1, N, M]; `full` is [B, H, N, M]."""
    if bias is None:
        return None
    if cu_seqlens is not None:
        raise ValueError("bias cannot be combined with cu_seqlens")
    check_floating("bias", bias)
    shape = (1,) * (4 - bias.ndim) + bias.shape
    if len(shape) > 4 or any(size not in (1, whole) for size, whole in zip(shape, full, strict=True)):
        raise ValueError(f"bias must be broadcastable to [B, H, N, M] = {full}, got {list(bias.shape)}")
    if bias.dtype not in (like.dtype, torch.float32):
        raise TypeError(f"bias must be {like.dtype} like the tensor it acts on, or torch.float32, got {bias.dtype}")
    check_device("bias", bias, like=like)
    return bias.expand(*shape[:2], *full[2:])


def draw_seed(dropout: float, *, like: Tensor) -> Tensor | None:
    """[1] int64 from PyTorch's random state, on the device: the host does not wait for it."""
    return torch.randint(2**63 - 1, (1,), device=like.device) if dropout > 0 else None


def obstacle(head_dim: int) -> str | None:
    """Why the kernels cannot compute this, or None."""
    if head_dim > MAX_HEAD_DIM:
        return f"the attention kernels take head dimensions up to {MAX_HEAD_DIM}, not {head_dim}"
    return None


def uses_operator(q: Tensor, tokens: int, plain: bool) -> bool:
    """Whether the registered operator computes a call of q [..., H, d], and not the reference; `plain` as in `Call`."""
    asked = asked_for("attention")
    blocked = providers.obstacle(asked, q, plain) if asked in providers.PROVIDERS else obstacle(q.shape[-1])

    def measured() -> Runs:
        return providers.forward_runs(q.shape[-1], q.dtype, tokens, gpu(q.device))

    return provider("attention", q, blocked, measured) != "reference"
