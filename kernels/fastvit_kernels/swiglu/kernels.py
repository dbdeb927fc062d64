"""Triton kernels of the gate of a SwiGLU MLP: elementwise, between two matrix products.

`pre` is the first product: a row holds the gates, then as many values for them, [rows, 2 * width].
"""

import triton
import triton.language as tl


@triton.jit
def swiglu_fwd_kernel(
    pre_ptr,  # [rows, 2 * width]
    post_ptr,  # out [rows, width]: silu(gate) * value
    rows,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = (row < rows)[:, None] & (column < width)[None, :]  # [BLOCK_M, BLOCK_N]
    offset = row[:, None] * (2 * width) + column[None, :]
    gate = tl.load(pre_ptr + offset, mask=mask, other=0).to(tl.float32)
    value = tl.load(pre_ptr + offset + width, mask=mask, other=0).to(tl.float32)
    post = gate * tl.sigmoid(gate) * value
    tl.store(post_ptr + row[:, None] * width + column[None, :], post.to(post_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_bwd_kernel(
    grad_ptr,  # [rows, width]: of post
    pre_ptr,  # [rows, 2 * width]
    grad_pre_ptr,  # out [rows, 2 * width]
    post_ptr,  # out [rows, width] or None: silu(gate) * value, again
    partial_ptr,  # out [programs, 2 * width] float32 or None: this program's share of the column sums of `grad_pre`
    rows,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program, programs = tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    column_mask = column < width
    gate_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    value_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # each program always takes the same rows in the same order, so the sums are the same bits in every run
    for start in tl.range(program * BLOCK_M, rows, programs * BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
        mask = (row < rows)[:, None] & column_mask[None, :]  # [BLOCK_M, BLOCK_N]
        offset = row[:, None] * width + column[None, :]
        pre_offset = row[:, None] * (2 * width) + column[None, :]
        grad = tl.load(grad_ptr + offset, mask=mask, other=0).to(tl.float32)
        gate = tl.load(pre_ptr + pre_offset, mask=mask, other=0).to(tl.float32)
        value = tl.load(pre_ptr + pre_offset + width, mask=mask, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        # d silu / d gate = sigmoid + silu * (1 - sigmoid)
        grad_gate = grad * value * (sigmoid + silu * (1 - sigmoid))
        grad_value = grad * silu
        tl.store(grad_pre_ptr + pre_offset, grad_gate.to(grad_pre_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_pre_ptr + pre_offset + width, grad_value.to(grad_pre_ptr.dtype.element_ty), mask=mask)
        if post_ptr is not None:
            tl.store(post_ptr + offset, (silu * value).to(post_ptr.dtype.element_ty), mask=mask)
        gate_sum += grad_gate
        value_sum += grad_value
    if partial_ptr is not None:
        partial = partial_ptr + program * (2 * width) + column
        tl.store(partial, tl.sum(gate_sum, axis=0), mask=column_mask)
        tl.store(partial + width, tl.sum(value_sum, axis=0), mask=column_mask)
