"""The Triton kernel that adds up partial column sums."""

import triton
import triton.language as tl


@triton.jit
def column_sums_kernel(
    stacks,  # tuple of (partial_ptr [sums, programs, width] float32, tuple of `sums` out_ptr [width], programs, width)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Each program adds BLOCK_N columns of one of the sums, always in the same order."""
    block = tl.program_id(0)
    for i in tl.static_range(len(stacks)):
        partial_ptr, out_ptrs, programs, width = stacks[i]
        blocks = tl.cdiv(width, BLOCK_N)
        for j in tl.static_range(len(out_ptrs)):
            if (block >= 0) & (block < blocks):
                column = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
                total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for start in range(0, programs, BLOCK_M):
                    row = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
                    mask = (row < programs)[:, None] & (column < width)[None, :]
                    offset = (j * programs + row).to(tl.int64)[:, None] * width + column[None, :]
                    total += tl.load(partial_ptr + offset, mask=mask, other=0)
                out = tl.sum(total, axis=0).to(out_ptrs[j].dtype.element_ty)
                tl.store(out_ptrs[j] + column, out, mask=column < width)
            block -= blocks
