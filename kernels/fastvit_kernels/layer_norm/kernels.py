"""Triton kernels of layer normalisation, alone or after a residual addition.

A program holds BLOCK_M whole rows in registers, so a row is read once and its statistics are centred: the mean first,
then the mean of squared deviations from it. All arithmetic is float32. An optional pointer is None when it is not used.
"""

import triton
import triton.language as tl


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr,  # [rows, width], rows `stride_x` apart
    branch_ptr,  # [rows, width], rows `stride_branch` apart, or None: plain layer normalisation of x
    layer_scale_ptr,  # [width] or None
    path_scale_ptr,  # [samples] or None
    weight_ptr,  # [width]
    bias_ptr,  # [width]
    y_ptr,  # out [rows, width]: x + path_scale * layer_scale * branch; None without a branch
    normed_ptr,  # out [rows, width]
    mean_ptr,  # out [rows]
    rstd_ptr,  # out [rows]: 1 / sqrt(variance + eps)
    rows,
    width,
    rows_per_sample,
    stride_x,
    stride_branch,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_mask, column_mask = row < rows, column < width
    mask = row_mask[:, None] & column_mask[None, :]  # [BLOCK_M, BLOCK_N]
    out = row[:, None] * width + column[None, :]

    y = tl.load(x_ptr + row[:, None] * stride_x + column[None, :], mask=mask, other=0).to(tl.float32)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + row[:, None] * stride_branch + column[None, :], mask=mask, other=0)
        branch = branch.to(tl.float32)
        if layer_scale_ptr is not None:
            branch *= tl.load(layer_scale_ptr + column, mask=column_mask, other=0).to(tl.float32)[None, :]
        if path_scale_ptr is not None:
            branch *= tl.load(path_scale_ptr + row // rows_per_sample, mask=row_mask, other=0)[:, None]
        # normalise what is stored, not the unrounded sum: the backward pass and the next layer see only that
        stored = (y + branch).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + out, stored, mask=mask)
        y = stored.to(tl.float32)

    mean = tl.sum(y, axis=1) / width  # [BLOCK_M]
    centred = tl.where(mask, y - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
    weight = tl.load(weight_ptr + column, mask=column_mask, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column_mask, other=0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + out, normed.to(normed_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean, mask=row_mask)
    tl.store(rstd_ptr + row, rstd, mask=row_mask)


@triton.jit
def layer_norm_bwd_kernel(
    grad_y_ptr,  # [rows, width], rows `stride_grad_y` apart, or None: no gradient of the sum itself
    grad_normed_ptr,  # [rows, width], rows `stride_grad_normed` apart
    y_ptr,  # [rows, width], rows `stride_y` apart: what was normalised
    branch_ptr,  # [rows, width], rows `stride_branch` apart; None without a layer_scale
    layer_scale_ptr,  # [width] or None
    path_scale_ptr,  # [samples] or None
    weight_ptr,  # [width]
    mean_ptr,  # [rows]
    rstd_ptr,  # [rows]
    grad_x_ptr,  # out [rows, width]
    grad_branch_ptr,  # out [rows, width], or None where it equals grad_x
    partial_ptr,  # out [2 or 3, programs, width] float32 or None: its share of grad weight, bias, layer_scale
    rows,
    width,
    rows_per_sample,
    stride_grad_y,
    stride_grad_normed,
    stride_y,
    stride_branch,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK_N)
    column_mask = column < width
    weight = tl.load(weight_ptr + column, mask=column_mask, other=0).to(tl.float32)[None, :]
    if layer_scale_ptr is not None:
        layer_scale = tl.load(layer_scale_ptr + column, mask=column_mask, other=0).to(tl.float32)[None, :]
        layer_scale_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    weight_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bias_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    # each program always takes the same rows in the same order, so the sums are the same bits in every run
    for start in tl.range(program * BLOCK_M, rows, programs * BLOCK_M, num_stages=STAGES):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        row_mask = row < rows
        mask = row_mask[:, None] & column_mask[None, :]
        out = row[:, None] * width + column[None, :]

        grad_normed = tl.load(
            grad_normed_ptr + row[:, None] * stride_grad_normed + column[None, :], mask=mask, other=0
        ).to(tl.float32)
        y = tl.load(y_ptr + row[:, None] * stride_y + column[None, :], mask=mask, other=0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row_mask, other=0)
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0)

        standard = (y - mean[:, None]) * rstd[:, None]  # [BLOCK_M, BLOCK_N]; where masked, its factors below are 0
        weight_sum += grad_normed * standard
        bias_sum += grad_normed
        grad_standard = grad_normed * weight
        mean_grad = tl.sum(grad_standard, axis=1) / width  # [BLOCK_M]
        mean_product = tl.sum(grad_standard * standard, axis=1) / width
        grad_x = (grad_standard - mean_grad[:, None] - standard * mean_product[:, None]) * rstd[:, None]
        if grad_y_ptr is not None:
            grad_y = tl.load(grad_y_ptr + row[:, None] * stride_grad_y + column[None, :], mask=mask, other=0)
            grad_x += grad_y.to(tl.float32)
        tl.store(grad_x_ptr + out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)

        if grad_branch_ptr is not None:
            grad_branch = grad_x
            if path_scale_ptr is not None:
                path_scale = tl.load(path_scale_ptr + row // rows_per_sample, mask=row_mask, other=0)
                grad_branch *= path_scale[:, None]
            if layer_scale_ptr is not None:
                branch = tl.load(branch_ptr + row[:, None] * stride_branch + column[None, :], mask=mask, other=0)
                layer_scale_sum += grad_branch * branch.to(tl.float32)
                grad_branch *= layer_scale
            tl.store(grad_branch_ptr + out, grad_branch.to(grad_branch_ptr.dtype.element_ty), mask=mask)

    if partial_ptr is not None:
        partial = partial_ptr + program * width + column
        tl.store(partial, tl.sum(weight_sum, axis=0), mask=column_mask)
        tl.store(partial + programs * width, tl.sum(bias_sum, axis=0), mask=column_mask)
        if layer_scale_ptr is not None:
            tl.store(partial + 2 * programs * width, tl.sum(layer_scale_sum, axis=0), mask=column_mask)


@triton.jit
def column_sum_kernel(
    partial_ptr,  # [2 or 3, programs, width] float32
    grad_weight_ptr,  # out [width]
    grad_bias_ptr,  # out [width]
    grad_layer_scale_ptr,  # out [width] or None
    programs,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    which = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    column_mask = column < width
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, programs, BLOCK_M):
        program = start + tl.arange(0, BLOCK_M)
        mask = (program < programs)[:, None] & column_mask[None, :]
        offset = (which * programs + program)[:, None] * width + column[None, :]
        total += tl.load(partial_ptr + offset, mask=mask, other=0)
    column_sum = tl.sum(total, axis=0)
    if which == 0:
        tl.store(grad_weight_ptr + column, column_sum.to(grad_weight_ptr.dtype.element_ty), mask=column_mask)
    elif which == 1:
        tl.store(grad_bias_ptr + column, column_sum.to(grad_bias_ptr.dtype.element_ty), mask=column_mask)
    else:
        if grad_layer_scale_ptr is not None:
            element = grad_layer_scale_ptr.dtype.element_ty
            tl.store(grad_layer_scale_ptr + column, column_sum.to(element), mask=column_mask)
