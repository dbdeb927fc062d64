"""Attention by the libraries that PyTorch brings along, inside our operator: what is saved is what our kernels save.

A provider computes softmax(q k^T / sqrt(d)) v and its gradients, without bias, dropout, another scale, a causal mask or
sequences of different lengths. The forward and the backward pass may have different ones: all that passes between them
is `out` and `lse`. Which one runs is what `FASTVIT_KERNELS` asks for, else what the table of the GPU says, else our own
kernels.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from fastvit_kernels.dispatch import Gpu, asked_for, gpu, refusal, unmeasured
from fastvit_kernels.table import Runs, Tunable, tunable

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]


class Provider(Protocol):
    """Tensors are views [B, H, N, d] of q and [B, H, M, d] of k and v; `lse` is [B, H, N] float32, to base e."""

    def obstacle(self, q: Tensor) -> str | None:
        """Why it cannot take q [..., d], or None."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`out` [B, H, N, d] and `lse`."""

    def backward(self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """Gradients of q, k and v."""


class Library:
    """What the libraries have in common."""

    largest_head_dim = 0

    def obstacle(self, q: Tensor) -> str | None:
        head_dim = q.shape[-1]
        if q.dtype not in (torch.bfloat16, torch.float16):
            return f"takes bfloat16 and float16, not {q.dtype}"
        if head_dim % 8 or head_dim > self.largest_head_dim:
            return f"takes head dimensions that are multiples of 8, up to {self.largest_head_dim}, not {head_dim}"
        if not q.is_cuda or torch.version.hip:
            return f"runs on an NVIDIA GPU, not on {'AMD' if q.is_cuda else q.device}"
        return None


class Cudnn(Library):
    """cuDNN. Its gradients may differ in their last bits from run to run."""

    largest_head_dim = 128

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, compute_log_sumexp=True)
        return out, lse.view(out.shape[:3])  # [B, H, N, 1]

    def backward(self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        unused = q.new_empty((), dtype=torch.int64)  # random state of dropout
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, q, k, v, out, lse.unsqueeze(-1), philox_seed=unused, philox_offset=unused, attn_bias=None,
            cum_seq_q=None, cum_seq_k=None, max_q=q.shape[2], max_k=k.shape[2], dropout_p=0.0, is_causal=False,
        )  # fmt: skip


class Flash(Library):
    """FlashAttention-2, its backward pass in the deterministic form."""

    largest_head_dim = 256

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
        return out, lse

    def backward(self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        unused = q.new_empty(2, dtype=torch.uint64)  # random state of dropout
        with deterministic():
            return aten._scaled_dot_product_flash_attention_backward(
                grad_out, q, k, v, out, lse, cum_seq_q=None, cum_seq_k=None, max_q=q.shape[2], max_k=k.shape[2],
                dropout_p=0.0, is_causal=False, philox_seed=unused, philox_offset=unused,
            )  # fmt: skip


PROVIDERS: dict[str, Provider] = {"cudnn": Cudnn(), "flash": Flash()}


@contextmanager
def deterministic() -> Iterator[None]:
    """Libraries take their deterministic form inside. Unlike elsewhere, new memory is not filled beforehand."""
    memory: Any = torch.utils.deterministic
    asked, fills = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    memory.fill_uninitialized_memory = asked and fills
    torch.use_deterministic_algorithms(True, warn_only=warns or not asked)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=warns)
        memory.fill_uninitialized_memory = fills


def obstacle(name: str, q: Tensor, plain: bool) -> str | None:
    """Why this provider cannot compute a call, or None; `plain` as in `launch.Call`."""
    if not plain:
        return f"{name} attention has no bias, dropout, scale, causal mask or sequences of different lengths here"
    reason = PROVIDERS[name].obstacle(q)
    return None if reason is None else f"{name} attention {reason}"


def chosen(runs_of: Tunable[Runs], q: Tensor, plain: bool) -> str:
    """What computes a call of the operator, for q [..., N, H, d]: "triton" or one of `PROVIDERS`.

    Raises RuntimeError if one was asked for that cannot.
    """
    asked = asked_for("attention")
    if asked == "triton" or q.is_meta:  # on the meta device, our kernels are compiled
        return "triton"
    if asked in PROVIDERS:
        if (reason := obstacle(asked, q, plain)) is not None:
            raise RuntimeError(refusal(q, reason))
        return asked
    tokens, _, head_dim = q.shape[-3:]
    name = runs_of(head_dim, q.dtype, tokens, gpu(q.device)).provider
    return name if name in PROVIDERS and obstacle(name, q, plain) is None else "triton"


def forward(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, N, H*d] of q [B, N, H, d] and k, v [B, M, H, d]; `lse` [B, H, N] to base 2, as our kernels save it."""
    out, lse = PROVIDERS[name].forward(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2).flatten(2).contiguous(), (lse * math.log2(math.e)).contiguous()


def backward(name: str, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    """Gradients of q, k and v, in their layout; `out` and its gradient are [B, N, H*d], `lse` is to base 2."""
    grad_out, out = (x.unflatten(2, q.shape[2:]) for x in (grad_out, out))
    grad_out, q, k, v, out = (x.transpose(1, 2) for x in (grad_out, q, k, v, out))
    grad_q, grad_k, grad_v = PROVIDERS[name].backward(grad_out, q, k, v, out, lse * math.log(2))
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2)


NAMES = ("triton", *PROVIDERS, "reference")


@tunable(Runs, "attention_fwd", sizes=("tokens",), providers=NAMES)
def forward_runs(head_dim: int, dtype: torch.dtype, tokens: int, on: Gpu) -> Runs:
    return unmeasured("attention", dtype)


@tunable(Runs, "attention_bwd", sizes=("tokens",), providers=NAMES)
def backward_runs(head_dim: int, dtype: torch.dtype, tokens: int, on: Gpu) -> Runs:
    return unmeasured("attention", dtype)
