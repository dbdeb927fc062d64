import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.attention import reference
from fastvit_kernels.checks import check_floating, check_rate
from fastvit_kernels.dispatch import HAS_TRITON, Gpu, gpu, uses_triton
from fastvit_kernels.registration import register_gradient, register_op
from fastvit_kernels.tuning.table import tunable

if HAS_TRITON:
    import triton

    from fastvit_kernels.attention import kernels

MAX_HEAD_DIM = 128  # of the kernels; the reference takes any


def attention(qkv: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Multi-head self-attention softmax(q k^T / sqrt(d)) v of packed queries, keys and values (Vaswani et al. 2017).

    Args:
        qkv: [B, N, 3, H, d], any floating dtype: what one linear layer of width 3*H*d gives, unflattened.
        dropout: rate at which attention probabilities are dropped; active whenever above 0.

    Returns [B, N, H*d] in the dtype of qkv. Raises ValueError for a wrong shape or rate, TypeError for a wrong dtype.
    Dropout and d above 128 run the reference; where Triton was asked for by name, they raise RuntimeError.
    """
    check_floating("qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must have shape [B, N, 3, H, d], got {list(qkv.shape)}")
    check_rate("dropout", dropout)
    if uses_triton(qkv, obstacle(qkv.shape[-1], dropout)):
        return attention_op(qkv)[0]
    return reference.attention(qkv, dropout)


def obstacle(head_dim: int, dropout: float) -> str | None:
    """Why the kernels cannot compute this, or None."""
    if head_dim > MAX_HEAD_DIM:
        return f"the attention kernels take head dimensions up to {MAX_HEAD_DIM}, not {head_dim}"
    if dropout > 0:
        return "the attention kernels have no dropout"
    return None


def launch_forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = fake_forward(qkv)
    if out.numel() == 0:
        return out, lse
    qkv = with_adjacent_heads(qkv)
    batch, tokens, _, heads, head_dim = qkv.shape
    tiling = forward_tiling(head_dim, qkv.dtype, tokens, gpu(qkv.device))
    kernels.attention_fwd_kernel[batch * heads * tiling.blocks(tokens),](
        *qkv.unbind(2),
        out,
        lse,
        tokens,
        heads,
        qkv.stride(0),
        qkv.stride(1),
        base_2_scale(head_dim),
        HEAD_DIM=head_dim,
        PIECES=pieces(head_dim),
        **tiling.options(tokens),
    )
    return out, lse


def fake_forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, head_dim = qkv.shape
    return (
        qkv.new_empty(batch, tokens, heads * head_dim),
        qkv.new_empty(batch, heads, tokens, dtype=torch.float32),  # log2 of the sum of 2 ** (scale * q k^T)
    )


def launch_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    grad_qkv = fake_backward(grad_out, qkv, out, lse)
    if grad_qkv.numel() == 0:
        return grad_qkv
    qkv = with_adjacent_heads(qkv)
    if grad_out.stride(2) != 1:
        grad_out = grad_out.contiguous()
    batch, tokens, _, heads, head_dim = qkv.shape
    (q, k, v), (grad_q, grad_k, grad_v) = qkv.unbind(2), grad_qkv.unbind(2)
    sizes_and_strides = (
        tokens,
        heads,
        qkv.stride(0),
        qkv.stride(1),
        grad_out.stride(0),
        grad_out.stride(1),
        grad_qkv.stride(1),
        base_2_scale(head_dim),
    )
    head = {"HEAD_DIM": head_dim, "PIECES": pieces(head_dim)}
    delta = torch.empty_like(lse)
    tiling = backward_query_tiling(head_dim, qkv.dtype, tokens, gpu(qkv.device))
    kernels.attention_bwd_query_kernel[batch * heads * tiling.blocks(tokens),](
        q, k, v, out, grad_out, lse, delta, grad_q, *sizes_and_strides, **head, **tiling.options(tokens)
    )
    tiling = backward_key_tiling(head_dim, qkv.dtype, tokens, gpu(qkv.device))
    kernels.attention_bwd_key_kernel[batch * heads * tiling.blocks(tokens),](
        q, k, v, grad_out, lse, delta, grad_k, grad_v, *sizes_and_strides, **head, **tiling.options(tokens)
    )
    return grad_qkv


def fake_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


def with_adjacent_heads(qkv: Tensor) -> Tensor:
    """A copy, unless the numbers of a head, and the heads of a token, follow each other in memory."""
    _, _, _, heads, head_dim = qkv.shape
    adjacent = qkv.stride(4) == 1 and (heads == 1 or qkv.stride(3) == head_dim)
    return qkv if adjacent else qkv.contiguous()


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
    max_registers: int | None = None  # a thread; 128 lets two programs of 8 warps share a multiprocessor

    def row_tails(self, tokens: int) -> tuple[int, ...]:
        """Rows left over by whole blocks: in blocks of 64, where `rows` allows it, and a single one by itself, as 1."""
        size = min(self.rows, 64)
        blocks, rest = divmod(tokens % self.rows, size)
        return (size,) * blocks + ((1,) if rest == 1 else (size,) if rest else ())

    def blocks(self, tokens: int) -> int:
        return tokens // self.rows + len(self.row_tails(tokens))

    def options(self, tokens: int) -> dict[str, Any]:
        rest = tokens % self.columns
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
    return Tiling(128, 64, num_warps=8, stages=2, max_registers=128 if on.arch == "sm_90" and head_dim <= 80 else None)


@tunable(Tiling, "attention_bwd_query_kernel", sizes=("tokens",))
def backward_query_tiling(head_dim: int, dtype: torch.dtype, tokens: int, on: Gpu) -> Tiling:
    if dtype == torch.float32:
        return Tiling(32, 32, num_warps=8, stages=1)
    if on.arch.startswith("gfx"):
        return Tiling(64, 32, num_warps=4, stages=1)
    return Tiling(128, 32, num_warps=8, stages=2, max_registers=128 if on.arch == "sm_90" and head_dim < 96 else None)


@tunable(Tiling, "attention_bwd_key_kernel", sizes=("tokens",))
def backward_key_tiling(head_dim: int, dtype: torch.dtype, tokens: int, on: Gpu) -> Tiling:
    if dtype == torch.float32:
        return Tiling(32, 32, num_warps=8, stages=1)
    if on.arch.startswith("gfx"):
        return Tiling(64, 32, num_warps=4, stages=1)
    return Tiling(128, 64 if head_dim <= 80 else 32, num_warps=8, stages=2)


def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    ctx.save_for_backward(inputs[0], out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_out: Tensor, _: None) -> Tensor:
    return attention_backward_op(grad_out, *ctx.saved_tensors)


attention_op = register_op("attention(Tensor qkv) -> (Tensor out, Tensor lse)", launch_forward, fake_forward)
attention_backward_op = register_op(
    "attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse) -> Tensor grad_qkv",
    launch_backward,
    fake_backward,
)
register_gradient(attention_op, attention_backward_op, setup_context, backward)
