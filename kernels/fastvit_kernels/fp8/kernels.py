"""Triton kernels that make FP8 operands and multiply them. Their scales are those of `scales.py`, bit for bit.

A scale comes from `bits`, the largest magnitude as int32: of each row, of each column, or of the whole matrix, which is
the largest of SLOTS numbers, so that not all programs write to one. Memory for maxima is 0 before. An optional pointer
is None when it is not used.
"""

import triton
import triton.language as tl

from fastvit_kernels.fp8_scales.device import count_overflow, in_fp8, magnitude_bits, scales, store_maxima, top_of
from fastvit_kernels.gemm.kernels import gelu_and_slope
from fastvit_kernels.layer_norm.kernels import both, columns_of, existing


@triton.jit
def maxima_kernel(
    x_ptr,  # [rows, width], rows `stride_x` apart
    row_bits_ptr,  # in and out [rows] int32 or None
    column_bits_ptr,  # in and out [width] int32 or None
    whole_bits_ptr,  # in and out [SLOTS] int32 or None
    rows,
    width,
    stride_x,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_mask, column_mask = row < rows, column < width
    mask = row_mask[:, None] & column_mask[None, :]
    value = tl.load(x_ptr + row[:, None] * stride_x + column[None, :], mask=mask, other=0).to(tl.float32)
    slot = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
    store_maxima(value, row, column, row_mask, column_mask, slot, row_bits_ptr, column_bits_ptr, whole_bits_ptr, SLOTS)


@triton.jit
def quantise_kernel(
    x_ptr,  # [rows, width], rows `stride_x` apart
    row_bits_ptr,  # [rows] int32, or [SLOTS] if WHOLE; None if `rows_ptr` is
    column_bits_ptr,  # [width] int32 or None; not read if WHOLE
    rows_ptr,  # out [rows, width] FP8 or None
    row_inverse_ptr,  # out [rows] float32, [1] if WHOLE; None if `rows_ptr` is
    columns_ptr,  # out [width, padded_rows] FP8 or None: the transpose, 0 beyond `rows`
    column_inverse_ptr,  # out [width] float32, [1] if WHOLE; None if `columns_ptr` is
    overflows_ptr,  # in and out int32
    rows,
    width,
    padded_rows,
    stride_x,
    WHOLE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_mask, column_mask = row < rows, column < width
    mask = row_mask[:, None] & column_mask[None, :]
    is_first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    value = tl.load(x_ptr + row[:, None] * stride_x + column[None, :], mask=mask, other=0).to(tl.float32)
    if WHOLE:
        bits = tl.max(tl.load(row_bits_ptr + tl.arange(0, SLOTS)), axis=0)
    if rows_ptr is not None:
        dtype: tl.constexpr = rows_ptr.dtype.element_ty
        if WHOLE:
            scale, inverse, overflows = scales(bits, top_of(dtype))
            scaled = value * scale
            tl.store(row_inverse_ptr, inverse, mask=is_first)
            tl.atomic_max(overflows_ptr, overflows.to(tl.int32), mask=is_first & overflows)
        else:
            row_bits = tl.load(row_bits_ptr + row, mask=row_mask, other=0)
            scale, inverse, overflows = scales(row_bits, top_of(dtype))
            scaled = value * scale[:, None]
            if tl.program_id(1) == 0:
                tl.store(row_inverse_ptr + row, inverse, mask=row_mask)
                count_overflow(overflows_ptr, overflows)
        tl.store(rows_ptr + row[:, None] * width + column[None, :], in_fp8(scaled, dtype), mask=mask)
    if columns_ptr is not None:
        dtype_of_columns: tl.constexpr = columns_ptr.dtype.element_ty
        if WHOLE:
            scale, inverse, overflows = scales(bits, top_of(dtype_of_columns))
            scaled = value * scale
            tl.store(column_inverse_ptr, inverse, mask=is_first)
            tl.atomic_max(overflows_ptr, overflows.to(tl.int32), mask=is_first & overflows)
        else:
            column_bits = tl.load(column_bits_ptr + column, mask=column_mask, other=0)
            scale, inverse, overflows = scales(column_bits, top_of(dtype_of_columns))
            scaled = value * scale[None, :]
            if tl.program_id(0) == 0:
                tl.store(column_inverse_ptr + column, inverse, mask=column_mask)
                count_overflow(overflows_ptr, overflows)
        scaled = tl.where(row_mask[:, None], scaled, 0.0)  # the padding is 0 even if the scale is NaN
        padded = column_mask[:, None] & (row < padded_rows)[None, :]
        tl.store(
            columns_ptr + column[:, None] * padded_rows + row[None, :], in_fp8(scaled.T, dtype_of_columns), mask=padded
        )


@triton.jit
def gelu_quantise_kernel(
    pre_ptr,  # [rows, width]
    post_ptr,  # out [rows, width] or None: GELU(pre)
    quantised_ptr,  # out [rows, width] FP8 or None: what `post` is, with a scale per row
    inverse_ptr,  # out [rows] float32 or None
    whole_bits_ptr,  # in and out [SLOTS] int32 or None: the largest magnitude of `post`
    overflows_ptr,  # in and out int32 or None
    rows,
    width,
    TANH: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A program holds BLOCK_M whole rows, in chunks as `layer_norm.kernels` has them."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    row_mask = row < rows
    posts = ()  # type: tuple
    bits = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for i in tl.static_range(CHUNKS):
        column = columns_of(i, BLOCK_M, BLOCK_N)
        mask = both(row_mask, existing(column, width, MASKED and i == CHUNKS - 1))
        pre = tl.load(pre_ptr + row * width + column, mask=mask, other=0)
        post, slope = gelu_and_slope(pre.to(tl.float32), TANH, pre.dtype)
        stored = post.to(pre_ptr.dtype.element_ty)
        if post_ptr is not None:
            tl.store(post_ptr + row * width + column, stored, mask=mask)
        post = stored.to(tl.float32)  # quantise what would be stored
        bits = tl.maximum(bits, magnitude_bits(post))
        posts += (post,)
    if whole_bits_ptr is not None:
        tl.atomic_max(whole_bits_ptr + tl.program_id(0) % SLOTS, tl.max(tl.max(bits, axis=1), axis=0))
    if quantised_ptr is not None:
        dtype: tl.constexpr = quantised_ptr.dtype.element_ty
        scale, inverse, overflows = scales(tl.max(bits, axis=1, keep_dims=True), top_of(dtype))
        for i in tl.static_range(CHUNKS):
            column = columns_of(i, BLOCK_M, BLOCK_N)
            mask = both(row_mask, existing(column, width, MASKED and i == CHUNKS - 1))
            tl.store(quantised_ptr + row * width + column, in_fp8(posts[i] * scale, dtype), mask=mask)
        tl.store(inverse_ptr + row, inverse, mask=row_mask)
        count_overflow(overflows_ptr, overflows)


@triton.jit
def fp8_gemm_kernel(
    a,  # FP8 [m, k]: a pointer, or a descriptor if DESCRIPTORS
    b,  # FP8 [n, k]
    out_ptr,  # out [m, n]: a b^T * a_inverse * b_inverse + bias
    a_inverse_ptr,  # [1] float32, or [m] if BY_ROWS
    b_inverse_ptr,  # [1] float32, or [n] if BY_ROWS
    bias_ptr,  # [n] or None
    m,
    n,
    k,
    BY_ROWS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EXACT: tl.constexpr,  # sums of the tensor cores, which keep fewer bits, are added up in float32 after each BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    tiles_a_group = GROUP_M * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        # GROUP_M tiles down, then the next column of tiles, so that tiles computed together share operands in L2
        first_m = tile // tiles_a_group * GROUP_M
        group_m = min(tiles_m - first_m, GROUP_M)
        start_m = (first_m + tile % tiles_a_group % group_m) * BLOCK_M
        start_n = tile % tiles_a_group // group_m * BLOCK_N
        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start_k in tl.range(0, max(k, 1), BLOCK_K, num_stages=STAGES):
            if DESCRIPTORS:
                left = a.load([start_m, start_k])
                right = b.load([start_n, start_k])
            else:
                row = start_m + tl.arange(0, BLOCK_M)
                column = start_n + tl.arange(0, BLOCK_N)
                inner = start_k + tl.arange(0, BLOCK_K)
                left = tl.load(
                    a + row.to(tl.int64)[:, None] * k + inner[None, :],
                    mask=(row < m)[:, None] & (inner < k)[None, :],
                    other=0.0,
                )
                right = tl.load(
                    b + column.to(tl.int64)[:, None] * k + inner[None, :],
                    mask=(column < n)[:, None] & (inner < k)[None, :],
                    other=0.0,
                )
            if EXACT:
                product = tl.dot(left, right.T, product, max_num_imprecise_acc=BLOCK_K)
            else:
                product = tl.dot(left, right.T, product)
        row = start_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        column = start_n + tl.arange(0, BLOCK_N)
        row_mask, column_mask = row < m, column < n
        if BY_ROWS:
            product *= tl.load(a_inverse_ptr + row, mask=row_mask, other=0)[:, None]
            product *= tl.load(b_inverse_ptr + column, mask=column_mask, other=0)[None, :]
        else:
            product = product * tl.load(a_inverse_ptr) * tl.load(b_inverse_ptr)
        if bias_ptr is not None:
            product += tl.load(bias_ptr + column, mask=column_mask, other=0).to(tl.float32)[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        tl.store(out_ptr + row[:, None] * n + column[None, :], product.to(out_ptr.dtype.element_ty), mask=mask)
