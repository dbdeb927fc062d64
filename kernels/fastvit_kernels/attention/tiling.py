"""How the kernels are cut into programs and blocks, and the defaults of that by GPU, dtype and head dimension."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from fastvit_kernels.dispatch import HAS_TRITON, Gpu
from fastvit_kernels.table import tunable

if HAS_TRITON:
    import triton

MAX_HEAD_DIM = 128  # of the kernels; the reference takes any


@cache
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


@lru_cache(maxsize=1024)
def launch_options(
    tiling: Tiling, tokens: int, streamed: int, head_dim: int, causal: bool
) -> tuple[int, dict[str, Any]]:
    """How many blocks programs own of `tokens`, and a kernel's constants if they stream `streamed`; not to be changed.

    Cached, as the sizes of one step are those of the next.
    """
    rest = streamed % tiling.columns
    options = {
        "HEAD_DIM": head_dim,
        "PIECES": pieces(head_dim),
        "BLOCK_M": tiling.rows,
        "TAILS_M": tiling.row_tails(tokens),
        "BLOCK_N": tiling.columns,
        "TAIL_N": max(16, triton.next_power_of_2(rest)) if rest else 0,
        "STAGES": tiling.stages,
        "CAUSAL": causal,
        "num_warps": tiling.num_warps,
    }
    if tiling.max_registers is not None:
        options["maxnreg"] = tiling.max_registers
    return tiling.blocks(tokens), options


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
        128, 32, num_warps=8, stages=stages, max_registers=128 if on.arch == "sm_90" and head_dim <= 80 else None
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
