"""Public attention functions, their checks, launches and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.attention import reference
from fastvit_kernels.checks import check_device, check_floating, check_parameter, check_rate
from fastvit_kernels.dispatch import HAS_TRITON, Gpu, gpu, uses_triton
from fastvit_kernels.registration import register_gradient, register_op
from fastvit_kernels.table import tunable

if HAS_TRITON:
    import triton

    from fastvit_kernels.attention import kernels

MAX_HEAD_DIM = 128  # of the kernels; the reference takes any


def attention(
    qkv: Tensor,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Multi-head self-attention softmax(q k^T / sqrt(d) + bias) v of packed q, k and v (Vaswani et al. 2017).

    Args:
        qkv: [B, N, 3, H, d], any floating dtype: the output of one linear layer of width 3*H*d, unflattened. With
            `cu_seqlens` [T, 3, H, d]: sequences of different lengths, concatenated.
        bias: broadcastable to [B, H, N, N], the dtype of qkv or float32. -inf keeps a query from a key; a query that
            sees no key has an output and gradients of 0.
        dropout: rate at which attention probabilities are dropped; active whenever above 0.
        cu_seqlens: [S + 1] int32 on the device of qkv: 0, then the end of each of S sequences; some may be empty.
            Tokens after the last end belong to no sequence: their output and gradients are 0.
        max_seqlen: length of the longest sequence, required with `cu_seqlens`. A smaller number only costs speed.

    Returns [B, N, H*d], or [T, H*d], in the dtype of qkv. Raises ValueError for a wrong shape, device, rate or
    combination, TypeError for a wrong dtype. d above 128 runs the reference, or raises RuntimeError if
    FASTVIT_KERNELS=triton.
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
    if uses_triton("attention", qkv, obstacle(qkv.shape[-1])):
        seed = draw_seed(dropout, like=qkv)
        call = Call(qkv, None, None, bias, seed, dropout, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return attention_op(*call)[0]
    q, k, v = qkv.unbind(-3)
    return reference.attention(q, k, v, bias, dropout, cu_seqlens, cu_seqlens)


def attention_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """`attention` of separate q, k and v, such as normalised ones, or queries of one sequence and keys of another.

    Args:
        q: [B, N, H, d], any floating dtype; with `cu_seqlens_q` [T, H, d].
        k, v: [B, M, H, d], the dtype of q; with `cu_seqlens_k` [U, H, d].
        bias: broadcastable to [B, H, N, M], the dtype of q or float32.
        dropout: rate at which attention probabilities are dropped.
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
    if uses_triton("attention", q, obstacle(q.shape[-1])):
        seed = draw_seed(dropout, like=q)
        call = Call(q, k, v, bias, seed, dropout, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return attention_op(*call)[0]
    return reference.attention(q, k, v, bias, dropout, cu_seqlens_q, cu_seqlens_k)


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


class Call(NamedTuple):
    """The arguments of the operator. `q` alone, without k and v, is packed [..., 3, H, d], and so is its gradient."""

    q: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None  # [B or 1, H or 1, N, M]
    seed: Tensor | None = None  # of dropout
    dropout: float = 0.0
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None


def launch_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Output and `lse`, see `fake_forward`; the arguments are those of `Call`."""
    call, (out, lse) = Call(*arguments), fake_forward(*arguments)
    q, k, v = separate(call)
    if out.numel() == 0 or k.numel() == 0:  # without keys, the output is 0
        return out.zero_(), lse.fill_(math.inf)
    programs, cut = cuts(forward_tiling, call, q, k, call.max_seqlen_q)
    kernels.attention_fwd_kernel[programs,](q, k, v, out, lse, **common_arguments(call, q, k, v), **cut)
    return out, lse


def fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = Call(*arguments)
    q = call.q.select(-3, 0) if call.k is None else call.q
    *images, tokens, heads, head_dim = q.shape
    return (
        q.new_empty(*images, tokens, heads * head_dim),
        q.new_empty(*images, heads, tokens, dtype=torch.float32),  # log2 of the sum of 2 ** (scale * q k^T)
    )


def launch_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """The gradient of packed q, k and v in a call without anything else."""
    return launch_gradients(grad_out, out, lse, False, qkv)[0]


def launch_gradients(
    grad_out: Tensor, out: Tensor, lse: Tensor, bias_needs_it: bool, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias, see `fake_gradients`; `arguments` are those of `Call`."""
    call, gradients = Call(*arguments), fake_gradients(grad_out, out, lse, bias_needs_it, *arguments)
    q, k, v = separate(call)
    grad_q, grad_k, grad_v = gradients[0].unbind(-3) if call.k is None else gradients[:3]
    if q.numel() == 0 or k.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    delta = torch.empty_like(lse)
    common = common_arguments(call, q, k, v) | {"grad_out_strides": strides(grad_out, 1)}
    programs, cut = cuts(backward_query_tiling, call, q, k, call.max_seqlen_q)
    kernels.attention_bwd_query_kernel[programs,](
        q, k, v, out, grad_out, lse, delta, grad_q, stride_grad=grad_q.stride(-3), **common, **cut
    )
    programs, cut = cuts(backward_key_tiling, call, k, q, call.max_seqlen_k)
    kernels.attention_bwd_key_kernel[programs,](
        q, k, v, grad_out, lse, delta, grad_k, grad_v, stride_grad=grad_k.stride(-3), **common, **cut
    )
    if call.bias is not None and bias_needs_it:
        launch_bias_gradient(q, k, v, grad_out, lse, delta, gradients[3], common)
    return gradients


def launch_bias_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_bias: Tensor,
    common: dict[str, Any],
) -> None:
    """A sum over the images and heads that have a bias in common: in shares, until there are programs enough."""
    device, (batch, tokens, heads, head_dim), keys = gpu(q.device), q.shape, k.shape[1]
    bias_batch, bias_heads = grad_bias.shape[:2]
    tiling = bias_gradient_tiling(head_dim, q.dtype, device.arch)
    blocks = bias_batch * bias_heads * triton.cdiv(tokens, tiling.rows) * triton.cdiv(keys, tiling.columns)
    images_in_common, heads_in_common = batch // bias_batch, heads // bias_heads
    shares = min(images_in_common * heads_in_common, triton.cdiv(2 * device.multiprocessors, blocks))
    parts = torch.empty(shares, *grad_bias.shape, dtype=torch.float32, device=q.device)
    kernels.attention_bwd_bias_kernel[shares * blocks,](
        q,
        k,
        v,
        grad_out,
        lse,
        delta,
        parts,
        bias_heads=bias_heads,
        images_in_common=images_in_common,
        heads_in_common=heads_in_common,
        shares=shares,
        BLOCK_M=tiling.rows,
        BLOCK_N=tiling.columns,
        STAGES=tiling.stages,
        num_warps=tiling.num_warps,
        **common,
    )
    grad_bias.copy_(parts.sum(0))


def fake_gradients(
    grad_out: Tensor, out: Tensor, lse: Tensor, bias_needs_it: bool, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(*arguments)
    grad_k, grad_v = (call.q.new_empty(0 if part is None else part.shape) for part in (call.k, call.v))
    bias = call.bias if bias_needs_it else None
    grad_bias = call.q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return call.q.new_empty(call.q.shape), grad_k, grad_v, grad_bias


def separate(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, [B, N, H, d] or [T, H, d]: the numbers of a head, and the heads of a token, adjacent in memory."""

    def adjacent(x: Tensor) -> Tensor:
        heads, head_dim = x.shape[-2:]
        return x if x.stride(-1) == 1 and (heads == 1 or x.stride(-2) == head_dim) else x.contiguous()

    if call.k is None or call.v is None:
        q, k, v = adjacent(call.q).unbind(-3)
        return q, k, v
    return adjacent(call.q), adjacent(call.k), adjacent(call.v)


def cuts(
    tiling_of: Callable[[int, torch.dtype, int, Gpu], Tiling],
    call: Call,
    owned: Tensor,
    streamed: Tensor,
    longest: int | None,
) -> tuple[int, dict[str, Any]]:
    """How many programs a kernel has, and how they divide the tokens they own and stream, as arguments by name."""
    tokens, heads, head_dim = owned.shape[-3:]
    tiling = with_room(tiling_of(head_dim, owned.dtype, longest or tokens, gpu(owned.device)), call)
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None or longest is None:
        programs = len(owned) * heads * tiling.blocks(tokens)
        return programs, {"lengths": None, **tiling.options(tokens, streamed.shape[-3])}
    sequences, blocks = len(call.cu_seqlens_q) - 1, max(1, triton.cdiv(longest, tiling.rows))
    lengths = call.cu_seqlens_q.contiguous(), call.cu_seqlens_k.contiguous(), sequences, blocks
    programs = (sequences + 1) * heads * blocks  # one more for what lies behind the last sequence
    return programs, {"lengths": lengths, **tiling.options(0)}  # every block is masked, there are no tails


def common_arguments(call: Call, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """Those that all kernels have, by name. What is as for q is None, see `kernels`."""
    tokens, heads, head_dim = q.shape[-3:]
    q_strides, k_strides, v_strides = (strides(x, 2) for x in (q, k, v))
    same = q_strides == k_strides == v_strides
    bias = None
    if call.bias is not None:
        (images, bias_heads), (of_image, of_head, of_query, of_key) = call.bias.shape[:2], call.bias.stride()
        bias = call.bias, of_image if images > 1 else 0, of_head if bias_heads > 1 else 0, of_query, of_key
    return {
        "bias": bias,
        "dropout": None if call.seed is None else (call.seed, call.dropout),
        "tokens": tokens,
        "keys": None if k.shape[-3] == tokens else k.shape[-3],
        "heads": heads,
        "q_strides": q_strides,
        "k_strides": None if same else k_strides,
        "v_strides": None if same else v_strides,
        "scale": base_2_scale(head_dim),
        "HEAD_DIM": head_dim,
        "PIECES": pieces(head_dim),
    }


def strides(x: Tensor, inner: int) -> tuple[int, int]:
    """From image to image and from token to token of [B, N, ...] or [T, ...], where "..." are `inner` dimensions."""
    return x.stride(0) if x.ndim == inner + 2 else 0, x.stride(-1 - inner)


def base_2_scale(head_dim: int) -> float:
    return math.log2(math.e) * head_dim**-0.5


def pieces(head_dim: int) -> tuple[int, ...]:
    """Powers of two from 16 on that add up to `head_dim`, rounded up to a multiple of 16: 80 = 64 + 16."""
    padded = -(-head_dim // 16) * 16
    return tuple(piece for piece in (128, 64, 32, 16) if padded & piece)


class Tiling(NamedTuple):
    """How a kernel is cut: a program owns `rows` tokens of a head and streams all its tokens, `columns` at a time."""

    rows: int
    columns: int
    num_warps: int
    stages: int
    max_registers: int | None = None  # per thread; 128 lets two programs of 8 warps share a multiprocessor

    def row_tails(self, tokens: int) -> tuple[int, ...]:
        """Rows left over by whole blocks: in blocks of 64, where `rows` allows it, and a single one by itself, as 1."""
        size = min(self.rows, 64)
        blocks, rest = divmod(tokens % self.rows, size)
        return (size,) * blocks + ((1,) if rest == 1 else (size,) if rest else ())

    def blocks(self, tokens: int) -> int:
        return tokens // self.rows + len(self.row_tails(tokens))

    def options(self, tokens: int, streamed: int | None = None) -> dict[str, Any]:
        """For programs that own blocks of `tokens` and stream `streamed`, or as many."""
        rest = (tokens if streamed is None else streamed) % self.columns
        options = {
            "BLOCK_M": self.rows,
            "TAILS_M": self.row_tails(tokens),
            "BLOCK_N": self.columns,
            "TAIL_N": max(16, triton.next_power_of_2(rest)) if rest else 0,
            "STAGES": self.stages,
            "num_warps": self.num_warps,
        }
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


# Defaults, chosen by what the compiler makes of them, `benchmarks/results/codegen`: the largest tiles that spill no
# register.


@tunable(Tiling, "attention_fwd_kernel", sizes=("tokens",))
def forward_tiling(head_dim: int, dtype: torch.dtype, tokens: int, on: Gpu) -> Tiling:
    if dtype == torch.float32:
        return Tiling(32, 32, num_warps=8, stages=1)
    if on.arch.startswith("gfx"):
        return Tiling(128, 64, num_warps=4, stages=1)
    if on.arch == "sm_90" and head_dim <= 80:  # the mask of a partial piece, as in 72, takes registers
        return Tiling(128, 32 if head_dim % 16 else 64, num_warps=8, stages=2, max_registers=128)
    return Tiling(128, 64, num_warps=8, stages=3 if on.arch == "sm_100" and head_dim <= 64 else 2)


@tunable(Tiling, "attention_bwd_query_kernel", sizes=("tokens",))
def backward_query_tiling(head_dim: int, dtype: torch.dtype, tokens: int, on: Gpu) -> Tiling:
    if dtype == torch.float32:
        return Tiling(32, 32, num_warps=8, stages=2 if on.arch == "sm_80" else 1)
    if on.arch.startswith("gfx"):
        return Tiling(64, 32, num_warps=4, stages=1)
    stages = 3 if on.arch == "sm_80" and head_dim > 96 else 2
    return Tiling(
        128, 32, num_warps=8, stages=stages, max_registers=128 if on.arch == "sm_90" and head_dim < 96 else None
    )


@tunable(Tiling, "attention_bwd_key_kernel", sizes=("tokens",))
def backward_key_tiling(head_dim: int, dtype: torch.dtype, tokens: int, on: Gpu) -> Tiling:
    if dtype == torch.float32:
        return Tiling(32, 32, num_warps=4 if on.arch.startswith("gfx") else 8, stages=1)
    if on.arch.startswith("gfx"):
        return Tiling(64, 32, num_warps=4, stages=1)
    if on.arch == "sm_80" and head_dim <= 112:
        return Tiling(64, 32 if head_dim <= 88 else 16, num_warps=4, stages=2)
    if on.arch == "sm_80":
        return Tiling(128, 16, num_warps=8, stages=2)
    if on.arch == "sm_90" and head_dim <= 64:  # narrower blocks, so that two programs share a multiprocessor
        return Tiling(128, 16, num_warps=8, stages=3, max_registers=128)
    return Tiling(128, 64 if head_dim <= 80 else 32, num_warps=8, stages=2)


def bias_gradient_tiling(head_dim: int, dtype: torch.dtype, arch: str) -> Tiling:
    """Programs own `rows` x `columns` of a bias."""
    if dtype == torch.float32:
        return Tiling(32, 32, num_warps=8, stages=1)
    if arch == "sm_80" or head_dim > 80:
        return Tiling(64, 32, num_warps=8, stages=1)
    return Tiling(64, 64, num_warps=4, stages=1)


def with_room(tiling: Tiling, call: Call) -> Tiling:
    """A bias, dropout and masks of lengths need registers: half the columns for each, and no limit on registers."""
    needs = sum(option is not None for option in (call.bias, call.seed, call.cu_seqlens_q))
    return tiling._replace(columns=max(16, tiling.columns >> needs), max_registers=None) if needs else tiling


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    tensors = [argument if isinstance(argument, Tensor) else None for argument in inputs]
    ctx.save_for_backward(out, lse, *tensors)
    ctx.numbers = [None if isinstance(argument, Tensor) else argument for argument in inputs]
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_out: Tensor, _: None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    call = Call(*(number if tensor is None else tensor for tensor, number in zip(tensors, ctx.numbers, strict=True)))
    wanted = call.bias is not None and ctx.needs_input_grad[3]
    grad_q, grad_k, grad_v, grad_bias = attention_backward_op(grad_out, out, lse, wanted, *call)
    packed = call.k is None
    gradients = grad_q, None if packed else grad_k, None if packed else grad_v, grad_bias if wanted else None
    return *gradients, *[None] * (len(call) - 4)


ARGUMENTS = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? seed, float dropout, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k"
)
attention_op = register_op(f"attention({ARGUMENTS}) -> (Tensor out, Tensor lse)", launch_forward, fake_forward)
attention_backward_op = register_op(
    f"attention_backward(Tensor grad_out, Tensor out, Tensor lse, bool bias_needs_it, {ARGUMENTS}) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)",
    launch_gradients,
    fake_gradients,
)
register_gradient(attention_op, attention_backward_op, setup_context, backward)
