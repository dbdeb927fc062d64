"""Makes FP8 operands of matrices, in the layouts that products read them in."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.dispatch import HAS_TRITON, compiles_only, uses_triton
from fastvit_kernels.fp8 import reference
from fastvit_kernels.fp8.setting import MULTIPLE
from fastvit_kernels.fp8_scales.handoff import SLOTS, Maxima, empty_maxima
from fastvit_kernels.registration import cdiv

if HAS_TRITON:
    from fastvit_kernels.fp8 import kernels
    from fastvit_kernels.launch import launch

BLOCK_M, BLOCK_N = 64, 64  # of a tile that is transposed


class Quantised(NamedTuple):
    """A matrix [T, K] in FP8, in one or both layouts, each with the inverses of its scales: [1], or one per row.

    Tensor cores of Hopper read FP8 operands along the dimension that is summed up only, so that a product over tokens
    needs the transpose in memory.
    """

    rows: Tensor | None = None  # [T, K]
    row_inverse: Tensor | None = None  # [1] or [T] float32
    columns: Tensor | None = None  # [K, T rounded up to a multiple of 16], 0 beyond T
    column_inverse: Tensor | None = None  # [1] or [K] float32


def quantise(
    x: Tensor,
    dtype: torch.dtype,
    by_rows: bool,
    overflows: Tensor,
    *,
    rows: bool = False,
    columns: bool = False,
    maxima: Maxima | None = None,
) -> Quantised:
    """x [T, K], with adjacent columns, in FP8: in the layouts asked for, with a scale per row of a layout if `by_rows`.

    maxima: what another pass has found already. overflows: int32 [1], set to 1 if a scale is out of range.
    """
    if not runs_kernels(x):
        *operands, out_of_range = reference.quantise(x, dtype, by_rows, rows=rows, columns=columns)
        torch.maximum(overflows, out_of_range.to(torch.int32), out=overflows)
        return Quantised(*operands)
    if maxima is None:
        maxima = find_maxima(x, by_rows, rows=rows, columns=columns)
    (tokens, width), whole = x.shape, not by_rows
    padded = cdiv(tokens, MULTIPLE) * MULTIPLE if columns else tokens
    given = Quantised(
        x.new_empty(tokens, width, dtype=dtype) if rows else None,
        x.new_empty(1 if whole else tokens, dtype=torch.float32) if rows else None,
        x.new_empty(width, padded, dtype=dtype) if columns else None,
        x.new_empty(1 if whole else width, dtype=torch.float32) if columns else None,
    )
    launch(
        kernels.quantise_kernel,
        (max(1, cdiv(padded, BLOCK_M)), max(1, cdiv(width, BLOCK_N))),
        x,
        maxima.whole if whole else maxima.row,
        None if whole else maxima.column,
        *given,
        overflows,
        tokens,
        width,
        padded,
        x.stride(0),
        WHOLE=whole,
        SLOTS=SLOTS,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        num_warps=4,
    )
    return given


def find_maxima(x: Tensor, by_rows: bool, *, rows: bool, columns: bool) -> Maxima:
    """The largest magnitudes of x [T, K], by a pass of their own."""
    maxima = empty_maxima(x, by_rows, rows=rows, columns=columns)
    tokens, width = x.shape
    if x.numel() == 0:
        return maxima
    block_m, block_n = 32, 128
    launch(
        kernels.maxima_kernel,
        (cdiv(tokens, block_m), cdiv(width, block_n)),
        x,
        *maxima,
        tokens,
        width,
        x.stride(0),
        SLOTS=SLOTS,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return maxima


def runs_kernels(x: Tensor) -> bool:
    """Whether Triton makes, or reads, FP8 operands like this tensor."""
    return compiles_only() or uses_triton("fp8", x)
