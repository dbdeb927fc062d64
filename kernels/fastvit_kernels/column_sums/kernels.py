"""The Triton kernel that adds up partial column sums."""

import triton
import triton.language as tl


@triton.jit
def column_sums_kernel(
    sums,  # tuple of (partial_ptr [programs, width] float32, out_ptr [width], programs, width)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Each program adds BLOCK_N columns of one of the sums, always in the same order."""
    block = tl.program_id(0)
    for i in tl.static_range(len(sums)):
        partial_ptr, out_ptr, programs, width = sums[i]
        blocks = tl.cdiv(width, BLOCK_N)
        if (block >= 0) & (block < blocks):
            column = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for start in range(0, programs, BLOCK_M):
                row = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
                mask = (row < programs)[:, None] & (column < width)[None, :]
                total += tl.load(partial_ptr + row.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0)
            tl.store(out_ptr + column, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=column < width)
        block -= blocks
