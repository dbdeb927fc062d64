"""Triton kernels of linear layers: a persistent matrix product with fused epilogues, and the same work on its own.

What an epilogue does (GELU, its slope, LayerScale, stochastic depth, residual, column sums) is also done by the
elementwise kernels below, for products that run in cuBLAS. All arithmetic is float32. An optional pointer
is None when it is not used.
"""

import triton
import triton.language as tl

from fastvit_kernels.fp8_scales.device import magnitude_bits


@triton.jit
def gelu_and_slope(x, TANH: tl.constexpr, dtype: tl.constexpr):
    """GELU(x) and its derivative for float32 x, exact enough for `dtype`; what the caller does not use is not computed.

    The exact form is max(x, 0) - u Phi(-u), with u = |x| and Phi the normal distribution function, and its derivative
    is 1 - q or q, for either sign of x, with q = Phi(-u) - u phi(u). Minimax polynomials give log2 Phi(-u) and
    q / Phi(-u): one exponential, no division, and no cancellation for negative x. Errors of Phi and of the derivative:
    1.2e-7 and 5e-7 for float32, 2.8e-7 and 1.9e-6 for 16 bits, whose rounding is above 2e-4.
    """
    if TANH:  # 1 + tanh(v) is 2 sigmoid(2 v), v = sqrt(2 / pi) (x + 0.044715 x^3)
        squared = x * x
        share = 1 / (1 + tl.exp2(-2.302208198454738 * x * (1 + 0.044715 * squared)))  # 2 sqrt(2 / pi) / log(2)
        slope = share + x * share * (1 - share) * (1.5957691216057308 * (1 + 0.134145 * squared))
        value = x * share
    else:
        u = tl.minimum(tl.abs(x), 12.0, propagate_nan=tl.PropagateNan.ALL)  # beyond, Phi(-u) is 0; infinity * 0 is not
        if dtype == tl.float32:
            exponent = 1.3869112990505528e-05 + u * -7.941688409118797e-07
            exponent = -0.00043668088619597256 + u * (-6.191855209181085e-05 + u * exponent)
            exponent = -0.052737846970558167 + u * (0.007441389840096235 + u * exponent)
            exponent = -1.1511114835739136 + u * (-0.4591389298439026 + u * exponent)
            ratio = 3.228951391065493e-05 + u * -2.212043682447984e-06
            ratio = -0.0021532324608415365 + u * (-4.296766928746365e-05 + u * ratio)
            ratio = -0.11040855944156647 + u * (0.02160988375544548 + u * ratio)
            ratio = -0.7979158163070679 + u * (-0.6362530589103699 + u * ratio)
        else:
            exponent = -0.0007358799921348691 + u * 3.075112545047887e-05
            exponent = -0.05313301831483841 + u * (0.007931430824100971 + u * exponent)
            exponent = -1.1511268615722656 + u * (-0.45899975299835205 + u * exponent)
            ratio = -0.0024931642692536116 + u * 0.00012266880366951227
            ratio = -0.11014911532402039 + u * (0.02177872508764267 + u * ratio)
            ratio = -0.7978531122207642 + u * (-0.6365338563919067 + u * ratio)
        tail = tl.exp2(u * exponent - 1)  # Phi(-u)
        value = tl.maximum(x, 0.0) - u * tail
        q = tail * (1 + u * ratio)
        slope = tl.where(x >= 0, 1 - q, q)
    return value, slope


@triton.jit
def load_tile(
    matrix,  # pointer to [rows, columns], rows `stride` apart, or its tensor descriptor
    row,
    column,
    rows,
    columns,
    stride,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """The tile [BLOCK_R, BLOCK_C] that starts at (row, column), 0 beyond the matrix."""
    if DESCRIPTOR:
        tile = matrix.load([row, column])
    else:
        r = row + tl.arange(0, BLOCK_R)
        c = column + tl.arange(0, BLOCK_C)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        tile = tl.load(matrix + r.to(tl.int64)[:, None] * stride + c[None, :], mask=mask, other=0)
    return tile


@triton.jit
def store_product(
    value,  # float32 [BLOCK_M, BLOCK_N], a part of the product
    tile_m,
    column_start,
    out_ptr,
    post_ptr,
    bias_ptr,
    pre_ptr,
    residual_ptr,
    layer_scale_ptr,
    path_scale_ptr,
    partial_ptr,
    m,
    n,
    rows_per_sample,
    stride_residual,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The epilogue, on one of PARTS column ranges at a time, so that fewer registers are needed at once."""
    if PARTS > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(value, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        store_product(
            left, tile_m, column_start, out_ptr, post_ptr, bias_ptr, pre_ptr, residual_ptr, layer_scale_ptr,
            path_scale_ptr, partial_ptr, m, n, rows_per_sample, stride_residual, TANH, BLOCK_M, HALF, PARTS // 2,
        )  # fmt: skip
        store_product(
            right, tile_m, column_start + HALF, out_ptr, post_ptr, bias_ptr, pre_ptr, residual_ptr, layer_scale_ptr,
            path_scale_ptr, partial_ptr, m, n, rows_per_sample, stride_residual, TANH, BLOCK_M, HALF, PARTS // 2,
        )  # fmt: skip
    else:
        row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        column = column_start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        row_mask, column_mask = row < m, column < n
        mask = row_mask[:, None] & column_mask[None, :]
        offset = row[:, None] * n + column[None, :]

        if bias_ptr is not None:
            value += tl.load(bias_ptr + column, mask=column_mask, other=0).to(tl.float32)[None, :]
        if pre_ptr is not None:
            pre = tl.load(pre_ptr + offset, mask=mask, other=0)
            post, slope = gelu_and_slope(pre.to(tl.float32), TANH, pre.dtype)
            value *= slope
        if layer_scale_ptr is not None:
            value *= tl.load(layer_scale_ptr + column, mask=column_mask, other=0).to(tl.float32)[None, :]
        if path_scale_ptr is not None:
            value *= tl.load(path_scale_ptr + row // rows_per_sample, mask=row_mask, other=0)[:, None]
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + row[:, None] * stride_residual + column[None, :], mask=mask, other=0)
            value += residual.to(tl.float32)
        if partial_ptr is not None:  # rows beyond m are 0
            tl.store(partial_ptr + tile_m * n + column, tl.sum(value, axis=0), mask=column_mask)
        if out_ptr is not None:
            tl.store(out_ptr + offset, value.to(out_ptr.dtype.element_ty), mask=mask)
        if post_ptr is not None:
            if pre_ptr is None:  # of what is stored, so that GELU can be computed again from it, bit by bit
                element: tl.constexpr = post_ptr.dtype.element_ty
                post, slope = gelu_and_slope(value.to(element).to(tl.float32), TANH, element)
            tl.store(post_ptr + offset, post.to(post_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gemm_kernel(
    a,  # [m, k], or [k, m] if A_TRANSPOSED; rows `stride_a` apart: a pointer, or a descriptor if DESCRIPTORS
    b,  # [k, n], or [n, k] if B_TRANSPOSED; rows `stride_b` apart
    out_ptr,  # out [m, n]: residual + path_scale * layer_scale * (a b + bias) * GELU'(pre); None if only `post` is kept
    post_ptr,  # out [m, n] or None: GELU(out), or GELU(pre)
    bias_ptr,  # [n] or None
    pre_ptr,  # [m, n] or None
    residual_ptr,  # [m, n], rows `stride_residual` apart, or None
    layer_scale_ptr,  # [n] or None
    path_scale_ptr,  # [samples] or None
    partial_ptr,  # out [ceil(m / BLOCK_M), n] float32 or None: sums of the rows of `out` in each row of tiles
    m,
    n,
    k,
    rows_per_sample,
    stride_a,
    stride_b,
    stride_residual,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    tiles_a_group = GROUP_M * tiles_n
    # flattened with the loop inside into one over all steps of all tiles, the operands of a tile are on their way while
    # the epilogue of the tile before runs
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        # GROUP_M tiles down, then the next column of tiles, so that tiles computed together share operands in L2
        first_m = tile // tiles_a_group * GROUP_M
        group_m = min(tiles_m - first_m, GROUP_M)
        tile_m = first_m + tile % tiles_a_group % group_m
        tile_n = tile % tiles_a_group // group_m
        start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N

        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # at least one step, over zeros for k = 0: what the compiler knows to run it can merge with the loop over tiles
        for start_k in tl.range(0, max(k, 1), BLOCK_K, num_stages=STAGES):
            if A_TRANSPOSED:
                left = load_tile(a, start_k, start_m, k, m, stride_a, BLOCK_K, BLOCK_M, DESCRIPTORS).T
            else:
                left = load_tile(a, start_m, start_k, m, k, stride_a, BLOCK_M, BLOCK_K, DESCRIPTORS)
            if B_TRANSPOSED:
                right = load_tile(b, start_n, start_k, n, k, stride_b, BLOCK_N, BLOCK_K, DESCRIPTORS).T
            else:
                right = load_tile(b, start_k, start_n, k, n, stride_b, BLOCK_K, BLOCK_N, DESCRIPTORS)
            product = tl.dot(left, right, product, input_precision="ieee")  # for float32: no TF32
        store_product(
            product, tile_m, start_n, out_ptr, post_ptr, bias_ptr, pre_ptr, residual_ptr, layer_scale_ptr,
            path_scale_ptr, partial_ptr, m, n, rows_per_sample, stride_residual, TANH, BLOCK_M, BLOCK_N, PARTS,
        )  # fmt: skip


@triton.jit
def gelu_fwd_kernel(
    pre_ptr,  # [size]
    post_ptr,  # out [size]: GELU(pre); may be pre itself
    size,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    pre = tl.load(pre_ptr + offset, mask=mask, other=0)
    post, slope = gelu_and_slope(pre.to(tl.float32), TANH, pre.dtype)
    tl.store(post_ptr + offset, post.to(post_ptr.dtype.element_ty), mask=mask)


@triton.jit
def residual_fwd_kernel(
    residual_ptr,  # [rows, width], rows `stride_residual` apart
    branch_ptr,  # [rows, width]
    bias_ptr,  # [width]
    layer_scale_ptr,  # [width] or None
    path_scale_ptr,  # [samples] or None
    out_ptr,  # out [rows, width]: residual + path_scale * layer_scale * (branch + bias)
    rows,
    width,
    rows_per_sample,
    stride_residual,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_mask, column_mask = row < rows, column < width
    mask = row_mask[:, None] & column_mask[None, :]
    offset = row[:, None] * width + column[None, :]
    value = tl.load(branch_ptr + offset, mask=mask, other=0).to(tl.float32)
    value += tl.load(bias_ptr + column, mask=column_mask, other=0).to(tl.float32)[None, :]
    if layer_scale_ptr is not None:
        value *= tl.load(layer_scale_ptr + column, mask=column_mask, other=0).to(tl.float32)[None, :]
    if path_scale_ptr is not None:
        value *= tl.load(path_scale_ptr + row // rows_per_sample, mask=row_mask, other=0)[:, None]
    residual = tl.load(residual_ptr + row[:, None] * stride_residual + column[None, :], mask=mask, other=0)
    tl.store(out_ptr + offset, (residual.to(tl.float32) + value).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradient_kernel(
    grad_ptr,  # [rows, width], rows `stride_grad` apart
    pre_ptr,  # [rows, width] or None
    layer_scale_ptr,  # [width] or None
    path_scale_ptr,  # [samples] or None
    out_ptr,  # out [rows, width] or None: path_scale * grad * GELU'(pre); may be grad itself
    scaled_ptr,  # out [rows, width] or None: layer_scale * out
    post_ptr,  # out [rows, width] or None: GELU(pre)
    partial_ptr,  # out [programs, width] float32 or None: this program's share of the column sums of `out`
    row_bits_ptr,  # in and out [rows] int32 or None: the largest magnitude in `out` of each row
    column_bits_ptr,  # in and out [width] int32 or None: of each column
    whole_bits_ptr,  # in and out [SLOTS] int32 or None: of all of it
    rows,
    width,
    rows_per_sample,
    stride_grad,
    TANH: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program, programs = tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < width
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    largest = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)  # no code where nothing asks for it
    if scaled_ptr is not None:
        layer_scale = tl.load(layer_scale_ptr + column, mask=column_mask, other=0).to(tl.float32)[None, :]
    # each program always takes the same rows in the same order, so the sums are the same bits in every run
    for start in tl.range(program * BLOCK_M, rows, programs * BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        row_mask = row < rows
        mask = row_mask[:, None] & column_mask[None, :]
        offset = row[:, None] * width + column[None, :]
        value = tl.load(grad_ptr + row[:, None] * stride_grad + column[None, :], mask=mask, other=0).to(tl.float32)
        if pre_ptr is not None:
            pre = tl.load(pre_ptr + offset, mask=mask, other=0)
            post, slope = gelu_and_slope(pre.to(tl.float32), TANH, pre.dtype)
            value *= slope
            if post_ptr is not None:
                tl.store(post_ptr + offset, post.to(post_ptr.dtype.element_ty), mask=mask)
        if path_scale_ptr is not None:
            value *= tl.load(path_scale_ptr + row // rows_per_sample, mask=row_mask, other=0)[:, None]
        if out_ptr is not None:
            tl.store(out_ptr + offset, value.to(out_ptr.dtype.element_ty), mask=mask)
        if scaled_ptr is not None:
            tl.store(scaled_ptr + offset, (value * layer_scale).to(scaled_ptr.dtype.element_ty), mask=mask)
        total += value
        if column_bits_ptr is not None or whole_bits_ptr is not None or row_bits_ptr is not None:
            bits = magnitude_bits(value.to(out_ptr.dtype.element_ty).to(tl.float32))  # of what is stored
            largest = tl.maximum(largest, bits)
            if row_bits_ptr is not None:
                tl.atomic_max(row_bits_ptr + row, tl.max(bits, axis=1), mask=row_mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + program * width + column, tl.sum(total, axis=0), mask=column_mask)
    if column_bits_ptr is not None:
        tl.atomic_max(column_bits_ptr + column, tl.max(largest, axis=0), mask=column_mask)
    if whole_bits_ptr is not None:
        slot = (tl.program_id(0) + program * tl.num_programs(0)) % SLOTS
        tl.atomic_max(whole_bits_ptr + slot, tl.max(tl.max(largest, axis=1), axis=0))


@triton.jit
def layer_scale_bwd_kernel(
    product_ptr,  # [width, k], in and out: grad^T x becomes the gradient of weight
    weight_ptr,  # [width, k], rows `stride_weight` apart
    bias_ptr,  # [width]
    layer_scale_ptr,  # [width]
    sum_ptr,  # [width] float32: column sums of grad
    grad_layer_scale_ptr,  # out [width]
    grad_bias_ptr,  # out [width]
    width,
    k,
    stride_weight,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < width
    layer_scale = tl.load(layer_scale_ptr + row, mask=row_mask, other=0).to(tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, k, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (column < k)[None, :]
        offset = row.to(tl.int64)[:, None] * k + column[None, :]
        weight_offset = row.to(tl.int64)[:, None] * stride_weight + column[None, :]
        product = tl.load(product_ptr + offset, mask=mask, other=0).to(tl.float32)
        total += product * tl.load(weight_ptr + weight_offset, mask=mask, other=0).to(tl.float32)
        tl.store(product_ptr + offset, (product * layer_scale[:, None]).to(product_ptr.dtype.element_ty), mask=mask)
    column_sum = tl.load(sum_ptr + row, mask=row_mask, other=0)
    bias = tl.load(bias_ptr + row, mask=row_mask, other=0).to(tl.float32)
    grad_layer_scale = tl.sum(total, axis=1) + bias * column_sum
    tl.store(grad_layer_scale_ptr + row, grad_layer_scale.to(grad_layer_scale_ptr.dtype.element_ty), mask=row_mask)
    tl.store(grad_bias_ptr + row, (column_sum * layer_scale).to(grad_bias_ptr.dtype.element_ty), mask=row_mask)
