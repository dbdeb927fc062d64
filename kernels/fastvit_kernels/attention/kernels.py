"""Triton kernels of attention: one forward, two backward. No program adds to what another writes.

Two splittings avoid padded matrix work. The head dimension is split into powers of two (80 = 64 + 16), so that rows of
one head are a tuple of matrices, one a piece. And tokens are split into whole blocks, which need no mask, and a tail:
for 257 tokens, 128 + 128 + 1 rows that programs own, against 64 + 64 + 64 + 64 + 16 columns that they stream. The
smallest matrix product of a Hopper GPU has 64 rows but may have 16 columns, which is why they differ; a single row
left over, the class token, is computed by vectors.

Queries, keys and values are [B, N, H, HEAD_DIM]: images `stride_batch` apart, tokens `stride_token`, heads adjacent.
Their gradients have tokens `stride_grad` apart and adjacent images and heads. The output is contiguous
[B, N, H, HEAD_DIM]. `lse` and `delta` are [B, H, N] float32, as all statistics and sums are. `scale` is
log2(e) / sqrt(HEAD_DIM), so a probability is 2 ** (scale * q k^T - lse). Products of float32 numbers are "ieee", never
TF32.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def first_of(sizes, i):
    """Where part i begins, when parts of these sizes follow each other."""
    return sum(sizes[:i])


@triton.jit
def load_rows(
    ptr, first, rows, stride, ROWS: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, PIECES: tl.constexpr
):
    """ROWS rows of one head from `first` on: a tuple of [ROWS, piece]. A MASKED block reads 0 from `rows` on."""
    ptr += tl.cast(first, tl.int64) * stride
    row = tl.arange(0, ROWS)
    tiles = ()  # type: tuple
    for i in tl.static_range(len(PIECES)):
        column = first_of(PIECES, i) + tl.arange(0, PIECES[i])
        pointer = ptr + row[:, None] * stride + column[None, :]
        if MASKED:
            tile = tl.load(pointer, mask=(first + row < rows)[:, None] & (column < HEAD_DIM)[None, :], other=0)
        elif first_of(PIECES, i + 1) > HEAD_DIM:
            tile = tl.load(pointer, mask=(column < HEAD_DIM)[None, :], other=0)
        else:
            tile = tl.load(pointer)
        tiles += (tile,)
    return tiles


@triton.jit
def store_rows(ptr, tiles, first, rows, stride, HEAD_DIM: tl.constexpr, PIECES: tl.constexpr):
    ptr += tl.cast(first, tl.int64) * stride
    row = tl.arange(0, tiles[0].shape[0])
    for i in tl.static_range(len(PIECES)):
        column = first_of(PIECES, i) + tl.arange(0, PIECES[i])
        inside = (first + row < rows)[:, None] & (column < HEAD_DIM)[None, :]
        tl.store(ptr + row[:, None] * stride + column[None, :], tiles[i].to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def zero_rows(ROWS: tl.constexpr, PIECES: tl.constexpr):
    tiles = ()  # type: tuple
    for i in tl.static_range(len(PIECES)):
        tiles += (tl.full([ROWS, PIECES[i]], 0.0, tl.float32),)
    return tiles


@triton.jit
def scale_rows(tiles, factor):
    scaled = ()
    for i in tl.static_range(len(tiles)):
        scaled += (tiles[i] * factor,)
    return scaled


@triton.jit
def row_dots(a, b):
    """Sums of a * b over the head dimension, [rows]."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), axis=1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), axis=1)
    return total


@triton.jit
def scores(a, b):
    """a b^T, a product over the head dimension, [rows of a, rows of b]."""
    if a[0].shape[0] == 1:
        return row_dots(a, b)[None, :]
    total = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        total = tl.dot(a[i], tl.trans(b[i]), total, input_precision="ieee")
    return total


@triton.jit
def add_weighted(total, weights, tiles):
    """total + weights @ tiles, with weights [M, N], N rows in tiles and M in total."""
    weights = weights.to(tiles[0].dtype)
    result = ()
    for i in tl.static_range(len(tiles)):
        if weights.shape[0] == 1:
            products = tl.trans(weights).to(tl.float32) * tiles[i].to(tl.float32)
            result += (total[i] + tl.sum(products, axis=0)[None, :],)
        else:
            result += (tl.dot(weights, tiles[i], total[i], input_precision="ieee"),)
    return result


@triton.jit
def attend(q, k, v, inside, scale, top, weight, total):
    """One step of a softmax over blocks of keys: the largest score so far, the sum of weights, and of weighted values.

    All three refer to `top`, and shrink when it grows.
    """
    s = scores(q, k) * scale  # [M, N]
    if inside is not None:
        s = tl.where(inside[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, axis=1))
    p = tl.exp2(s - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    weight = weight * shrink + tl.sum(p, axis=1)
    total = add_weighted(scale_rows(total, shrink[:, None]), p, v)
    return new_top, weight, total


@triton.jit
def attend_rows(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    first,
    tokens,
    stride_token,
    stride_out,
    scale,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of ROWS queries of one head, from `first` on, to all its keys."""
    q = load_rows(q_ptr, first, tokens, stride_token, ROWS, MASKED, HEAD_DIM, PIECES)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.full([ROWS], 0.0, tl.float32)
    total = zero_rows(ROWS, PIECES)
    whole = tokens // BLOCK_N * BLOCK_N
    for key in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
        k = load_rows(k_ptr, key, tokens, stride_token, BLOCK_N, False, HEAD_DIM, PIECES)
        v = load_rows(v_ptr, key, tokens, stride_token, BLOCK_N, False, HEAD_DIM, PIECES)
        top, weight, total = attend(q, k, v, None, scale, top, weight, total)
    if TAIL_N > 0:
        k = load_rows(k_ptr, whole, tokens, stride_token, TAIL_N, True, HEAD_DIM, PIECES)
        v = load_rows(v_ptr, whole, tokens, stride_token, TAIL_N, True, HEAD_DIM, PIECES)
        inside = whole + tl.arange(0, TAIL_N) < tokens
        top, weight, total = attend(q, k, v, inside, scale, top, weight, total)
    store_rows(out_ptr, scale_rows(total, 1 / weight[:, None]), first, tokens, stride_out, HEAD_DIM, PIECES)
    row = first + tl.arange(0, ROWS)
    tl.store(lse_ptr + row, top + tl.log2(weight), mask=row < tokens)


@triton.jit
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # out
    lse_ptr,  # out
    tokens,
    heads,
    stride_batch,
    stride_token,
    scale,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAILS_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program owns a block of queries of one head."""
    whole = tokens // BLOCK_M
    blocks = whole + len(TAILS_M)
    head_index, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, head = (head_index // heads).to(tl.int64), head_index % heads
    stride_out = heads * HEAD_DIM
    inputs = batch * stride_batch + head * HEAD_DIM
    q_ptr += inputs
    k_ptr += inputs
    v_ptr += inputs
    out_ptr += batch * tokens * stride_out + head * HEAD_DIM
    lse_ptr += head_index.to(tl.int64) * tokens
    # fmt: off
    if block < whole:
        attend_rows(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, block * BLOCK_M, tokens, stride_token, stride_out, scale,
                    BLOCK_M, False, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, STAGES)
    for t in tl.static_range(len(TAILS_M)):
        if block == whole + t:
            first = whole * BLOCK_M + first_of(TAILS_M, t)
            attend_rows(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, first, tokens, stride_token, stride_out, scale,
                        TAILS_M[t], TAILS_M[t] > 1, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, STAGES)
    # fmt: on


@triton.jit
def add_query_gradient(grad_q, q, grad_out, lse, delta, k, v, inside, scale):
    """Adds the share of some keys."""
    p = tl.exp2(scores(q, k) * scale - lse[:, None])  # [M, N]
    if inside is not None:
        p = tl.where(inside[None, :], p, 0.0)
    return add_weighted(grad_q, p * (scores(grad_out, v) - delta[:, None]), k)


@triton.jit
def query_gradient(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    first,
    tokens,
    stride_token,
    stride_out,
    stride_grad_out,
    stride_grad,
    scale,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of ROWS queries of one head, from `first` on."""
    row = first + tl.arange(0, ROWS)
    grad_out = load_rows(grad_out_ptr, first, tokens, stride_grad_out, ROWS, MASKED, HEAD_DIM, PIECES)
    delta = row_dots(grad_out, load_rows(out_ptr, first, tokens, stride_out, ROWS, MASKED, HEAD_DIM, PIECES))
    tl.store(delta_ptr + row, delta, mask=row < tokens)
    lse = tl.load(lse_ptr + row, mask=row < tokens, other=0)
    q = load_rows(q_ptr, first, tokens, stride_token, ROWS, MASKED, HEAD_DIM, PIECES)
    grad_q = zero_rows(ROWS, PIECES)
    whole = tokens // BLOCK_N * BLOCK_N
    for key in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
        k = load_rows(k_ptr, key, tokens, stride_token, BLOCK_N, False, HEAD_DIM, PIECES)
        v = load_rows(v_ptr, key, tokens, stride_token, BLOCK_N, False, HEAD_DIM, PIECES)
        grad_q = add_query_gradient(grad_q, q, grad_out, lse, delta, k, v, None, scale)
    if TAIL_N > 0:
        k = load_rows(k_ptr, whole, tokens, stride_token, TAIL_N, True, HEAD_DIM, PIECES)
        v = load_rows(v_ptr, whole, tokens, stride_token, TAIL_N, True, HEAD_DIM, PIECES)
        inside = whole + tl.arange(0, TAIL_N) < tokens
        grad_q = add_query_gradient(grad_q, q, grad_out, lse, delta, k, v, inside, scale)
    store_rows(grad_q_ptr, scale_rows(grad_q, HEAD_DIM**-0.5), first, tokens, stride_grad, HEAD_DIM, PIECES)


@triton.jit
def attention_bwd_query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_out_ptr,  # images `stride_grad_out_batch` apart, tokens `stride_grad_out`, heads adjacent
    lse_ptr,
    delta_ptr,  # out: sums of grad_out * out over a head, for the kernel of keys and values
    grad_q_ptr,  # out
    tokens,
    heads,
    stride_batch,
    stride_token,
    stride_grad_out_batch,
    stride_grad_out,
    stride_grad,
    scale,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAILS_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program owns the gradient of a block of queries of one head."""
    whole = tokens // BLOCK_M
    blocks = whole + len(TAILS_M)
    head_index, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, head = (head_index // heads).to(tl.int64), head_index % heads
    stride_out = heads * HEAD_DIM
    inputs = batch * stride_batch + head * HEAD_DIM
    q_ptr += inputs
    k_ptr += inputs
    v_ptr += inputs
    out_ptr += batch * tokens * stride_out + head * HEAD_DIM
    grad_out_ptr += batch * stride_grad_out_batch + head * HEAD_DIM
    grad_q_ptr += batch * tokens * stride_grad + head * HEAD_DIM
    lse_ptr += head_index.to(tl.int64) * tokens
    delta_ptr += head_index.to(tl.int64) * tokens
    # fmt: off
    if block < whole:
        query_gradient(q_ptr, k_ptr, v_ptr, out_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr, block * BLOCK_M,
                       tokens, stride_token, stride_out, stride_grad_out, stride_grad, scale,
                       BLOCK_M, False, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, STAGES)
    for t in tl.static_range(len(TAILS_M)):
        if block == whole + t:
            first = whole * BLOCK_M + first_of(TAILS_M, t)
            query_gradient(q_ptr, k_ptr, v_ptr, out_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr, first,
                           tokens, stride_token, stride_out, stride_grad_out, stride_grad, scale,
                           TAILS_M[t], TAILS_M[t] > 1, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, STAGES)
    # fmt: on


@triton.jit
def add_key_gradients(
    grad_k,
    grad_v,
    k,
    v,
    q_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    first,
    tokens,
    stride_token,
    stride_grad_out,
    scale,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Adds the share of COLUMNS queries. Scores are transposed, [keys, queries], as the two sums over queries want."""
    row = first + tl.arange(0, COLUMNS)
    q = load_rows(q_ptr, first, tokens, stride_token, COLUMNS, MASKED, HEAD_DIM, PIECES)
    grad_out = load_rows(grad_out_ptr, first, tokens, stride_grad_out, COLUMNS, MASKED, HEAD_DIM, PIECES)
    lse = tl.load(lse_ptr + row, mask=row < tokens, other=0)
    delta = tl.load(delta_ptr + row, mask=row < tokens, other=0)
    # Beyond the tokens, columns have p = 1, but grad_out and delta are 0 there; rows may overflow, but are not stored.
    p = tl.exp2(scores(k, q) * scale - lse[None, :])
    grad_v = add_weighted(grad_v, p, grad_out)
    grad_k = add_weighted(grad_k, p * (scores(v, grad_out) - delta[None, :]), q)
    return grad_k, grad_v


@triton.jit
def key_gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    first,
    tokens,
    stride_token,
    stride_grad_out,
    stride_grad,
    scale,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of ROWS keys and values of one head, from `first` on."""
    k = load_rows(k_ptr, first, tokens, stride_token, ROWS, MASKED, HEAD_DIM, PIECES)
    v = load_rows(v_ptr, first, tokens, stride_token, ROWS, MASKED, HEAD_DIM, PIECES)
    grad_k, grad_v = zero_rows(ROWS, PIECES), zero_rows(ROWS, PIECES)
    whole = tokens // BLOCK_N * BLOCK_N
    # fmt: off
    for row in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
        grad_k, grad_v = add_key_gradients(grad_k, grad_v, k, v, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, row, tokens,
                                           stride_token, stride_grad_out, scale, BLOCK_N, False, HEAD_DIM, PIECES)
    if TAIL_N > 0:
        grad_k, grad_v = add_key_gradients(grad_k, grad_v, k, v, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, whole, tokens,
                                           stride_token, stride_grad_out, scale, TAIL_N, True, HEAD_DIM, PIECES)
    # fmt: on
    store_rows(grad_k_ptr, scale_rows(grad_k, HEAD_DIM**-0.5), first, tokens, stride_grad, HEAD_DIM, PIECES)
    store_rows(grad_v_ptr, grad_v, first, tokens, stride_grad, HEAD_DIM, PIECES)


@triton.jit
def attention_bwd_key_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,  # images `stride_grad_out_batch` apart, tokens `stride_grad_out`, heads adjacent
    lse_ptr,
    delta_ptr,
    grad_k_ptr,  # out
    grad_v_ptr,  # out
    tokens,
    heads,
    stride_batch,
    stride_token,
    stride_grad_out_batch,
    stride_grad_out,
    stride_grad,
    scale,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAILS_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program owns the gradients of a block of keys and values of one head."""
    whole = tokens // BLOCK_M
    blocks = whole + len(TAILS_M)
    head_index, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, head = (head_index // heads).to(tl.int64), head_index % heads
    inputs = batch * stride_batch + head * HEAD_DIM
    gradients = batch * tokens * stride_grad + head * HEAD_DIM
    q_ptr += inputs
    k_ptr += inputs
    v_ptr += inputs
    grad_out_ptr += batch * stride_grad_out_batch + head * HEAD_DIM
    grad_k_ptr += gradients
    grad_v_ptr += gradients
    lse_ptr += head_index.to(tl.int64) * tokens
    delta_ptr += head_index.to(tl.int64) * tokens
    # fmt: off
    if block < whole:
        key_gradients(q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, block * BLOCK_M,
                      tokens, stride_token, stride_grad_out, stride_grad, scale,
                      BLOCK_M, False, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, STAGES)
    for t in tl.static_range(len(TAILS_M)):
        if block == whole + t:
            first = whole * BLOCK_M + first_of(TAILS_M, t)
            key_gradients(q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, first,
                          tokens, stride_token, stride_grad_out, stride_grad, scale,
                          TAILS_M[t], TAILS_M[t] > 1, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, STAGES)
    # fmt: on
