"""Attention under the names and with the arguments of flash-attn 2, for code that is written for it.

`from fastvit_kernels.flash_attn import flash_attn_func` takes the place of `from flash_attn import flash_attn_func`.
What is not supported is refused, never ignored.
"""

import torch
from torch import Tensor

from fastvit_kernels.attention import attention, attention_qkv

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """softmax(softmax_scale * q k^T) v.

    Args:
        q: [B, N, H, d], any floating dtype.
        k, v: [B, M, H, d]; as many heads as q.
        dropout_p: rate at which probabilities are dropped; pass 0 in evaluation.
        softmax_scale: of scores; None is 1 / sqrt(d).
        causal: the last query sees all keys, the one before it all but the last, and so on.
        return_attn_probs: return three tensors, as flash-attn does.

    The other arguments must have their defaults.

    Returns the output [B, N, H, d] in the dtype of q or, with `return_attn_probs`, (output, softmax_lse, an empty
    tensor): softmax_lse is [B, H, N] float32, the natural logarithm of each denominator, without a gradient. Raises
    NotImplementedError for an argument that is not supported, and else what `attention_qkv` raises.
    """
    refuse(window_size, softcap, alibi_slopes, deterministic, return_attn_probs and dropout_p > 0)
    result = attention_qkv(
        q, k, v, dropout=dropout_p, scale=softmax_scale, causal=causal, return_lse=return_attn_probs
    )  # fmt: skip
    return shaped(result, q.shape[2:])


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of packed qkv [B, N, 3, H, d], whose gradient is packed as well."""
    refuse(window_size, softcap, alibi_slopes, deterministic, return_attn_probs and dropout_p > 0)
    result = attention(qkv, dropout=dropout_p, scale=softmax_scale, causal=causal, return_lse=return_attn_probs)
    return shaped(result, qkv.shape[3:])


def refuse(
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    dropped_probabilities: bool,
) -> None:
    if tuple(window_size) != (-1, -1):
        raise NotImplementedError(f"window_size must be (-1, -1), got {tuple(window_size)}: all keys are in the window")
    if softcap != 0:
        raise NotImplementedError(f"softcap must be 0, got {softcap}: scores are not capped")
    if alibi_slopes is not None:
        raise NotImplementedError("alibi_slopes must be None: pass a bias to fastvit_kernels.attention instead")
    if deterministic:
        raise NotImplementedError(
            "deterministic must be False, as another library may be chosen to compute the gradient: "
            "the Triton kernels, FASTVIT_KERNELS=triton, always give the same bits"
        )
    if dropped_probabilities:
        raise NotImplementedError("return_attn_probs with dropout is not supported: probabilities are never in memory")


def shaped(result: Tensor | tuple[Tensor, Tensor], heads: torch.Size) -> Result:
    if isinstance(result, Tensor):
        return result.unflatten(-1, heads)
    out, lse = result
    return out.unflatten(-1, heads), lse, out.new_empty(0)
