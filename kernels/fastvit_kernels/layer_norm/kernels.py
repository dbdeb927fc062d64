"""Triton kernels of layer normalisation, alone or after a residual addition.

A program holds BLOCK_M whole rows in registers, so a row is read once and its statistics are centred: the mean first,
then the mean of squared deviations from it. A row is a tuple of CHUNKS tiles of BLOCK_N columns, since tiles have sizes
that are powers of two and widths have not: 1280 = 5 * 256, where one tile would be of 2048. The last one is masked if
MASKED. All arithmetic is float32. An optional pointer is None when it is not used.
"""

import triton
import triton.language as tl

from fastvit_kernels.fp8_scales.device import count_overflow, in_fp8, magnitude_bits, scales, top_of


@triton.jit
def columns_of(i: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The columns of chunk i, [BLOCK_M, BLOCK_N]."""
    return tl.broadcast_to(i * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], BLOCK_M, BLOCK_N)


@triton.jit
def existing(column, width, MAY_END: tl.constexpr):
    """Which of a chunk's columns exist; None, by a `return` that Triton 3.6 takes too, unless the row may end there."""
    if MAY_END:
        return column < width
    else:
        return


@triton.jit
def both(row_mask, column_mask):
    return row_mask if column_mask is None else row_mask & column_mask


@triton.jit
def load_columns(ptr, column, mask):
    """Elements of a vector at these columns as float32, 0 where masked."""
    if mask is None:
        return tl.load(ptr + column).to(tl.float32)
    else:
        return tl.load(ptr + column, mask=mask, other=0).to(tl.float32)


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr,  # [rows, width], rows `stride_x` apart
    branch_ptr,  # [rows, width], rows `stride_branch` apart, or None: plain layer normalisation of x
    branch_bias_ptr,  # [width] or None
    layer_scale_ptr,  # [width] or None
    path_scale_ptr,  # [samples] or None
    weight_ptr,  # [width]
    bias_ptr,  # [width]
    y_ptr,  # out [rows, width]: x + path_scale * layer_scale * (branch + branch_bias); None without a branch
    normed_ptr,  # out [rows, width]
    mean_ptr,  # out [rows]
    rstd_ptr,  # out [rows]: 1 / sqrt(variance + eps)
    quantised_ptr,  # out [rows, width] FP8 or None: what `normed` is, with a scale per row
    inverse_ptr,  # out [rows] float32 or None: inverses of these scales
    whole_bits_ptr,  # in and out [SLOTS] int32 or None: the largest magnitude of `normed`, see `fp8.kernels`
    overflows_ptr,  # in and out int32 or None: 1 if a scale is out of range
    rows,
    width,
    rows_per_sample,
    stride_x,
    stride_branch,
    eps,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    MASKED: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    row_mask = row < rows
    if path_scale_ptr is not None:  # divided before it is 64 bits wide, where a division takes ten times as long
        path_scale = tl.load(path_scale_ptr + row // rows_per_sample, mask=row_mask, other=0)
    row = row.to(tl.int64)

    y = ()  # type: tuple
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.static_range(CHUNKS):
        column = columns_of(i, BLOCK_M, BLOCK_N)
        column_mask = existing(column, width, MASKED and i == CHUNKS - 1)
        mask = both(row_mask, column_mask)
        chunk = tl.load(x_ptr + row * stride_x + column, mask=mask, other=0).to(tl.float32)
        if branch_ptr is not None:
            branch = tl.load(branch_ptr + row * stride_branch + column, mask=mask, other=0).to(tl.float32)
            if branch_bias_ptr is not None:
                branch += load_columns(branch_bias_ptr, column, column_mask)
            if layer_scale_ptr is not None:
                branch *= load_columns(layer_scale_ptr, column, column_mask)
            if path_scale_ptr is not None:
                branch *= path_scale
            # normalise what is stored, not the unrounded sum: the backward pass and the next layer see only that
            stored = (chunk + branch).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + row * width + column, stored, mask=mask)
            chunk = stored.to(tl.float32)
        total += chunk
        y += (chunk,)

    mean = tl.sum(total, axis=1, keep_dims=True) / width  # [BLOCK_M, 1]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.static_range(CHUNKS):
        column = columns_of(i, BLOCK_M, BLOCK_N)
        column_mask = existing(column, width, MASKED and i == CHUNKS - 1)
        centred = y[i] - mean
        if column_mask is not None:
            centred = tl.where(column_mask, centred, 0.0)
        total += centred * centred
    rstd = tl.rsqrt(tl.sum(total, axis=1, keep_dims=True) / width + eps)

    bits = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)  # no code where nothing is quantised
    stored_chunks = ()  # type: tuple
    for i in tl.static_range(CHUNKS):
        column = columns_of(i, BLOCK_M, BLOCK_N)
        column_mask = existing(column, width, MASKED and i == CHUNKS - 1)
        weight, bias = load_columns(weight_ptr, column, column_mask), load_columns(bias_ptr, column, column_mask)
        normed = (y[i] - mean) * rstd * weight + bias
        normed = normed.to(normed_ptr.dtype.element_ty)
        tl.store(normed_ptr + row * width + column, normed, mask=both(row_mask, column_mask))
        if quantised_ptr is not None or whole_bits_ptr is not None:  # quantise what is stored
            wide = tl.where(row_mask, normed.to(tl.float32), 0.0)
            bits = tl.maximum(bits, magnitude_bits(wide))
            stored_chunks += (wide,)
    if whole_bits_ptr is not None:
        tl.atomic_max(whole_bits_ptr + tl.program_id(0) % SLOTS, tl.max(tl.max(bits, axis=1), axis=0))
    if quantised_ptr is not None:
        dtype: tl.constexpr = quantised_ptr.dtype.element_ty
        scale, inverse, overflows = scales(tl.max(bits, axis=1, keep_dims=True), top_of(dtype))
        for i in tl.static_range(CHUNKS):
            column = columns_of(i, BLOCK_M, BLOCK_N)
            mask = both(row_mask, existing(column, width, MASKED and i == CHUNKS - 1))
            tl.store(quantised_ptr + row * width + column, in_fp8(stored_chunks[i] * scale, dtype), mask=mask)
        tl.store(inverse_ptr + row, inverse, mask=row_mask)
        count_overflow(overflows_ptr, overflows)
    tl.store(mean_ptr + row, mean, mask=row_mask)
    tl.store(rstd_ptr + row, rstd, mask=row_mask)


@triton.jit
def layer_norm_bwd_kernel(
    grad_y_ptr,  # [rows, width], rows `stride_grad_y` apart, or None: no gradient of the sum itself
    grad_normed_ptr,  # [rows, width], rows `stride_grad_normed` apart
    y_ptr,  # [rows, width], rows `stride_y` apart: what was normalised
    branch_ptr,  # [rows, width], rows `stride_branch` apart, or None: no gradient of layer_scale
    layer_scale_ptr,  # [width] or None
    path_scale_ptr,  # [samples] or None
    weight_ptr,  # [width]
    mean_ptr,  # [rows]
    rstd_ptr,  # [rows]
    grad_x_ptr,  # out [rows, width]
    unscaled_ptr,  # out [rows, width] or None: path_scale * grad_x
    grad_branch_ptr,  # out [rows, width] or None: layer_scale * path_scale * grad_x
    partial_ptr,  # out [sums, programs, width] float32: this program's share of those sums that are computed, in this
    #               order: gradients of weight and bias, of layer_scale, columns of grad_y, of path_scale * grad_x
    rows,
    width,
    rows_per_sample,
    stride_grad_y,
    stride_grad_normed,
    stride_y,
    stride_branch,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    MASKED: tl.constexpr,
    SUM_PARAMETERS: tl.constexpr,
    SUM_GRAD_Y: tl.constexpr,
    SUM_BRANCH: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    weight_sums, bias_sums, layer_scale_sums = (), (), ()  # type: tuple, tuple, tuple
    grad_y_sums, branch_sums = (), ()  # type: tuple, tuple
    for _ in tl.static_range(CHUNKS):
        weight_sums += (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)
        bias_sums += (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)
        layer_scale_sums += (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)  # no code where nothing is added
        grad_y_sums += (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)
        branch_sums += (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)

    # each program always takes the same rows in the same order, so the sums are the same bits in every run
    for start in tl.range(program * BLOCK_M, rows, programs * BLOCK_M, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
        row_mask = row < rows
        mean = tl.load(mean_ptr + row, mask=row_mask, other=0)
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0)
        if path_scale_ptr is not None:
            path_scale = tl.load(path_scale_ptr + row // rows_per_sample, mask=row_mask, other=0)
        row = row.to(tl.int64)

        standards, grad_standards = (), ()  # type: tuple, tuple
        new_weight_sums, new_bias_sums, new_layer_scale_sums = (), (), ()  # type: tuple, tuple, tuple
        new_grad_y_sums, new_branch_sums = (), ()  # type: tuple, tuple
        grad_total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        product_total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in tl.static_range(CHUNKS):
            column = columns_of(i, BLOCK_M, BLOCK_N)
            column_mask = existing(column, width, MASKED and i == CHUNKS - 1)
            mask = both(row_mask, column_mask)
            weight = load_columns(weight_ptr, column, column_mask)
            grad_normed = tl.load(grad_normed_ptr + row * stride_grad_normed + column, mask=mask, other=0)
            grad_normed = grad_normed.to(tl.float32)
            y = tl.load(y_ptr + row * stride_y + column, mask=mask, other=0).to(tl.float32)
            standard = (y - mean) * rstd  # [BLOCK_M, BLOCK_N]; where masked, its factors below are 0
            grad_standard = grad_normed * weight
            new_weight_sums += (weight_sums[i] + grad_normed * standard,)
            new_bias_sums += (bias_sums[i] + grad_normed,)
            grad_total += grad_standard
            product_total += grad_standard * standard
            standards += (standard,)
            grad_standards += (grad_standard,)
        weight_sums, bias_sums = new_weight_sums, new_bias_sums
        # grad_x = rstd * (grad_standard - mean(grad_standard) - standard * mean(grad_standard * standard))
        offset = tl.sum(grad_total, axis=1, keep_dims=True) * (-rstd / width)  # [BLOCK_M, 1]
        slope = tl.sum(product_total, axis=1, keep_dims=True) * (-rstd / width)

        for i in tl.static_range(CHUNKS):
            column = columns_of(i, BLOCK_M, BLOCK_N)
            column_mask = existing(column, width, MASKED and i == CHUNKS - 1)
            mask = both(row_mask, column_mask)
            out = row * width + column
            grad_x = grad_standards[i] * rstd + (standards[i] * slope + offset)
            if grad_y_ptr is not None:
                grad_y = tl.load(grad_y_ptr + row * stride_grad_y + column, mask=mask, other=0).to(tl.float32)
                grad_x += grad_y
                if SUM_GRAD_Y:
                    new_grad_y_sums += (grad_y_sums[i] + grad_y,)
            tl.store(grad_x_ptr + out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
            grad_branch = grad_x
            if path_scale_ptr is not None:
                grad_branch *= path_scale
            if SUM_BRANCH:
                new_branch_sums += (branch_sums[i] + grad_branch,)
            if unscaled_ptr is not None:
                tl.store(unscaled_ptr + out, grad_branch.to(unscaled_ptr.dtype.element_ty), mask=mask)
            if grad_branch_ptr is not None:
                if branch_ptr is not None:
                    branch = tl.load(branch_ptr + row * stride_branch + column, mask=mask, other=0)
                    new_layer_scale_sums += (layer_scale_sums[i] + grad_branch * branch.to(tl.float32),)
                if layer_scale_ptr is not None:
                    grad_branch *= load_columns(layer_scale_ptr, column, column_mask)
                tl.store(grad_branch_ptr + out, grad_branch.to(grad_branch_ptr.dtype.element_ty), mask=mask)
        if branch_ptr is not None:
            layer_scale_sums = new_layer_scale_sums
        if SUM_GRAD_Y:
            grad_y_sums = new_grad_y_sums
        if SUM_BRANCH:
            branch_sums = new_branch_sums

    for i in tl.static_range(CHUNKS):
        column = i * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        column_mask = column < width
        partial = partial_ptr + program * width + column
        if SUM_PARAMETERS:
            tl.store(partial, tl.sum(weight_sums[i], axis=0), mask=column_mask)
            tl.store(partial + programs * width, tl.sum(bias_sums[i], axis=0), mask=column_mask)
            partial += 2 * programs * width
        if branch_ptr is not None:
            tl.store(partial, tl.sum(layer_scale_sums[i], axis=0), mask=column_mask)
            partial += programs * width
        if SUM_GRAD_Y:
            tl.store(partial, tl.sum(grad_y_sums[i], axis=0), mask=column_mask)
            partial += programs * width
        if SUM_BRANCH:
            tl.store(partial, tl.sum(branch_sums[i], axis=0), mask=column_mask)
