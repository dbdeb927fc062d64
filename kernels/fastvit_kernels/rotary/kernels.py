"""Triton kernels that normalise and rotate queries and keys: one read and one write of each number.

A row is one head of one token, d numbers. A program takes BLOCK_M of them, of the queries or of the keys, as whole rows
of BLOCK_D >= d columns. A channel's partner in its rotated pair is loaded a second time, from the cache, instead of
being moved between threads. All arithmetic is float32. An optional pointer is None when it is not used.
"""

import triton
import triton.language as tl


@triton.jit
def locate(row, tokens, heads, head_dim, stride_image, stride_token):
    """Where the heads of x [B, N, H, d] begin, [BLOCK_M, 1] in elements."""
    token = row // heads
    return ((token // tokens) * stride_image + (token % tokens) * stride_token + (row % heads) * head_dim)[:, None]


@triton.jit
def partners(column, head_dim, INTERLEAVED: tl.constexpr):
    """The other channel of each one's pair, and the sign with which that takes part: (a, b) turns to (-b, a)."""
    half = head_dim // 2
    if INTERLEAVED:
        partner = column ^ 1
        is_first = column % 2 == 0
    else:
        partner = tl.where(column < half, column + half, column - half)
        is_first = column < half
    return partner, tl.where(is_first, -1.0, 1.0)


@triton.jit
def load_angles(angle_ptr, row, column, tokens, heads, prefix, stride_angle, mask):
    """sin or cos [BLOCK_M, BLOCK_D] at these columns, 0 for the first `prefix` tokens; and which rows have any."""
    position = (row // heads) % tokens - prefix
    rotates = (position >= 0)[:, None]
    offset = position[:, None] * stride_angle + column
    return tl.load(angle_ptr + offset, mask=mask & rotates, other=0).to(tl.float32), rotates


@triton.jit
def centre(x, column_mask, head_dim, eps, RMS: tl.constexpr):
    """Mean and 1 / standard deviation of rows, [BLOCK_M, 1]; without a mean, of the root mean square, if RMS."""
    mean = tl.sum(x, axis=1) * (0.0 if RMS else 1.0 / head_dim)
    centred = tl.where(column_mask, x - mean[:, None], 0.0)
    return mean[:, None], tl.rsqrt(tl.sum(centred * centred, axis=1) / head_dim + eps)[:, None]


@triton.jit
def forward_rows(
    x_ptr, out_ptr, weight_ptr, bias_ptr, sin_ptr, cos_ptr, row, rows, tokens, heads, head_dim, prefix, stride_image,
    stride_token, out_stride_image, out_stride_token, stride_sin, stride_cos, eps, INTERLEAVED: tl.constexpr,
    RMS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    column_mask = column < head_dim
    mask = (row < rows)[:, None] & column_mask  # [BLOCK_M, BLOCK_D]
    start = x_ptr + locate(row, tokens, heads, head_dim, stride_image, stride_token)
    x = tl.load(start + column, mask=mask, other=0).to(tl.float32)
    if sin_ptr is not None:  # an odd head_dim, which only normalises, has a channel without a partner
        partner, sign = partners(column, head_dim, INTERLEAVED)
        other = tl.load(start + partner, mask=mask, other=0).to(tl.float32)
    if weight_ptr is not None:
        mean, rstd = centre(x, column_mask, head_dim, eps, RMS)
        x = (x - mean) * rstd * tl.load(weight_ptr + column, mask=column_mask, other=0).to(tl.float32)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + column, mask=column_mask, other=0).to(tl.float32)
        if sin_ptr is not None:
            other = (other - mean) * rstd * tl.load(weight_ptr + partner, mask=column_mask, other=0).to(tl.float32)
            if bias_ptr is not None:
                other += tl.load(bias_ptr + partner, mask=column_mask, other=0).to(tl.float32)
    if sin_ptr is not None:
        sin, rotates = load_angles(sin_ptr, row, column, tokens, heads, prefix, stride_sin, mask)
        cos, rotates = load_angles(cos_ptr, row, column, tokens, heads, prefix, stride_cos, mask)
        x = x * tl.where(rotates, cos, 1.0) + sign * other * sin
    out = out_ptr + locate(row, tokens, heads, head_dim, out_stride_image, out_stride_token) + column
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotary_fwd_kernel(
    q_ptr,  # [B, N, H, d], `stride_image` and `stride_token` apart, heads adjacent
    k_ptr,  # the same
    v_ptr,  # the same, or None: copied
    q_out_ptr,  # out [B, N, H, d], `out_stride_image` and `out_stride_token` apart
    k_out_ptr,
    v_out_ptr,  # or None
    q_weight_ptr,  # [d] or None: normalise q
    q_bias_ptr,  # [d] or None
    k_weight_ptr,  # [d] or None: normalise k
    k_bias_ptr,  # [d] or None
    sin_ptr,  # [N - prefix, d], rows `stride_sin` apart, or None: do not rotate
    cos_ptr,  # [N - prefix, d], with sin_ptr
    rows,  # B * N * H
    tokens,
    heads,
    head_dim,
    prefix,
    stride_image,
    stride_token,
    k_stride_image,
    k_stride_token,
    out_stride_image,
    out_stride_token,
    stride_sin,
    stride_cos,
    eps,
    INTERLEAVED: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    part = tl.program_id(1)
    if part == 0:
        forward_rows(
            q_ptr, q_out_ptr, q_weight_ptr, q_bias_ptr, sin_ptr, cos_ptr, row, rows, tokens, heads, head_dim, prefix,
            stride_image, stride_token, out_stride_image, out_stride_token, stride_sin, stride_cos, eps, INTERLEAVED,
            RMS, BLOCK_D,
        )  # fmt: skip
    elif part == 1:
        forward_rows(
            k_ptr, k_out_ptr, k_weight_ptr, k_bias_ptr, sin_ptr, cos_ptr, row, rows, tokens, heads, head_dim, prefix,
            k_stride_image, k_stride_token, out_stride_image, out_stride_token, stride_sin, stride_cos, eps,
            INTERLEAVED, RMS, BLOCK_D,
        )  # fmt: skip
    elif v_ptr is not None:
        forward_rows(
            v_ptr, v_out_ptr, None, None, None, None, row, rows, tokens, heads, head_dim, prefix, stride_image,
            stride_token, out_stride_image, out_stride_token, stride_sin, stride_cos, eps, INTERLEAVED, RMS, BLOCK_D,
        )  # fmt: skip


@triton.jit
def backward_rows(
    grad_ptr, x_ptr, out_ptr, weight_ptr, partial_ptr, sin_ptr, cos_ptr, rows, tokens, heads, head_dim, prefix,
    grad_stride_image, grad_stride_token, stride_image, stride_token, out_stride_image, out_stride_token, stride_sin,
    stride_cos, eps, INTERLEAVED: tl.constexpr, RMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    column_mask = column < head_dim
    partner, sign = partners(column, head_dim, INTERLEAVED)
    weight_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    bias_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # each program always takes the same rows in the same order, so the sums are the same bits in every run
    for first in tl.range(program * BLOCK_M, rows, programs * BLOCK_M):
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
        mask = (row < rows)[:, None] & column_mask  # [BLOCK_M, BLOCK_D]
        start = grad_ptr + locate(row, tokens, heads, head_dim, grad_stride_image, grad_stride_token)
        grad = tl.load(start + column, mask=mask, other=0).to(tl.float32)
        if sin_ptr is not None:
            # the gradient turns the other way round: what a channel gave to its partner comes back from there
            other = tl.load(start + partner, mask=mask, other=0).to(tl.float32)
            sin, rotates = load_angles(sin_ptr, row, partner, tokens, heads, prefix, stride_sin, mask)
            cos, rotates = load_angles(cos_ptr, row, column, tokens, heads, prefix, stride_cos, mask)
            grad = grad * tl.where(rotates, cos, 1.0) - sign * other * sin
        if weight_ptr is not None:
            x_start = x_ptr + locate(row, tokens, heads, head_dim, stride_image, stride_token)
            x = tl.load(x_start + column, mask=mask, other=0).to(tl.float32)
            mean, rstd = centre(x, column_mask, head_dim, eps, RMS)
            normed = tl.where(mask, (x - mean) * rstd, 0.0)
            weight_sum += grad * normed
            bias_sum += grad
            grad *= tl.load(weight_ptr + column, mask=column_mask, other=0).to(tl.float32)
            along = tl.sum(grad * normed, axis=1)[:, None] / head_dim
            shift = tl.sum(grad, axis=1)[:, None] * (0.0 if RMS else 1.0 / head_dim)
            grad = rstd * (grad - shift - normed * along)
        out = out_ptr + locate(row, tokens, heads, head_dim, out_stride_image, out_stride_token) + column
        tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=mask)
    if weight_ptr is not None:
        column_1d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
        partial = partial_ptr + program * head_dim + column_1d
        tl.store(partial, tl.sum(weight_sum, axis=0), mask=column_1d < head_dim)
        tl.store(partial + programs * head_dim, tl.sum(bias_sum, axis=0), mask=column_1d < head_dim)


@triton.jit
def rotary_bwd_kernel(
    q_grad_ptr,  # [B, N, H, d], `grad_stride_image` and `grad_stride_token` apart, heads adjacent
    k_grad_ptr,
    v_grad_ptr,  # or None: copied
    q_ptr,  # [B, N, H, d] as in the forward pass, with q_weight_ptr
    k_ptr,  # with k_weight_ptr
    q_out_ptr,  # out [B, N, H, d]: the gradient
    k_out_ptr,
    v_out_ptr,  # or None
    q_weight_ptr,  # [d] or None
    k_weight_ptr,  # [d] or None
    partial_ptr,  # out [2, 2, programs, d] float32, or None without weights: of q and k, shares of weight and bias
    sin_ptr,  # [N - prefix, d] or None
    cos_ptr,
    rows,
    tokens,
    heads,
    head_dim,
    prefix,
    grad_stride_image,
    grad_stride_token,
    k_grad_stride_image,
    k_grad_stride_token,
    stride_image,
    stride_token,
    k_stride_image,
    k_stride_token,
    out_stride_image,
    out_stride_token,
    stride_sin,
    stride_cos,
    eps,
    INTERLEAVED: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    part = tl.program_id(1)
    if part == 0:
        backward_rows(
            q_grad_ptr, q_ptr, q_out_ptr, q_weight_ptr, partial_ptr, sin_ptr, cos_ptr, rows, tokens, heads, head_dim,
            prefix, grad_stride_image, grad_stride_token, stride_image, stride_token, out_stride_image,
            out_stride_token, stride_sin, stride_cos, eps, INTERLEAVED, RMS, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    elif part == 1:
        k_partial_ptr = partial_ptr
        if partial_ptr is not None:
            k_partial_ptr = partial_ptr + 2 * tl.num_programs(0) * head_dim
        backward_rows(
            k_grad_ptr, k_ptr, k_out_ptr, k_weight_ptr, k_partial_ptr, sin_ptr, cos_ptr, rows, tokens, heads, head_dim,
            prefix, k_grad_stride_image, k_grad_stride_token, k_stride_image, k_stride_token, out_stride_image,
            out_stride_token, stride_sin, stride_cos, eps, INTERLEAVED, RMS, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    elif v_grad_ptr is not None:
        backward_rows(
            v_grad_ptr, None, v_out_ptr, None, None, None, None, rows, tokens, heads, head_dim, prefix,
            grad_stride_image, grad_stride_token, stride_image, stride_token, out_stride_image, out_stride_token,
            stride_sin, stride_cos, eps, INTERLEAVED, RMS, BLOCK_M, BLOCK_D,
        )  # fmt: skip
