"""Triton kernels of attention: one forward, three backward. No program adds to what another writes.

Two splittings avoid padded matrix work. The head dimension is split into powers of two (80 = 64 + 16), so that rows of
one head are a tuple of matrices, one a piece. And tokens are split into whole blocks, which need no mask, and a tail:
for 257 tokens, 128 + 128 + 1 rows that programs own, against 64 + 64 + 64 + 64 + 16 columns that they stream. The
smallest matrix product of a Hopper GPU has 64 rows but may have 16 columns, which is why they differ; a single row
left over, the class token, is computed by vectors.

A program streams the tail before the whole blocks. If it came after that loop, which may run zero times, its
accumulators would be merged from two paths while a wgmma is in flight, and ptxas would serialise every product.

Queries, keys and values are [B, N, H, HEAD_DIM], heads adjacent, with `*_strides` from image to image and from token to
token. Their gradients have tokens `stride_grad` apart and adjacent images and heads. The output is contiguous
[B, N, H, HEAD_DIM]. `lse` and `delta` are [B, H, N] float32, as all statistics and sums are. `scale` is
log2(e) / sqrt(HEAD_DIM), so a probability is 2 ** (scale * q k^T - lse). Products of float32 numbers are "ieee", never
TF32.

What a call does not use is None, at compile time, and leaves no trace in the machine code:

- `keys`, the number of key tokens, and the strides of k and v, where they are those of the queries;
- `bias`: a pointer and the strides of images, heads, queries and keys. It is added to q k^T / sqrt(HEAD_DIM);
- `dropout`: a pointer to a seed, and the rate. A probability is kept or not by seed, head, query and key alone;
- `lengths`, where B sequences of different lengths lie behind each other, tokens [T, H, HEAD_DIM] and statistics
  [H, T]: pointers to where the sequences of queries and of keys begin, int32 [B + 1], B, and the blocks that programs
  share in a sequence. Tokens behind the last sequence have no keys and no queries: output and gradients are 0 there.

A query without keys, or with a bias of -inf for all of them, has an output of 0; its lse is inf, which makes every
probability 0.

Helpers that give None say `return`: to the compiler of Triton 3.6 a None is nothing, and cannot be part of a tuple.
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
def span(lengths, WHICH: tl.constexpr, sequence, tokens, end):
    """Where an image or a sequence begins among all tokens, and its number of tokens. WHICH: 0 queries, 1 keys.

    What lies behind the last sequence counts as one more sequence, which reaches to `end`.
    """
    if lengths is None:
        return sequence * tokens, tokens
    else:
        cu_seqlens_ptr, sequences = lengths[WHICH], lengths[2]
        first = tl.load(cu_seqlens_ptr + sequence)
        end = tl.load(cu_seqlens_ptr + sequence + 1, mask=sequence < sequences, other=end)
        return first.to(tl.int64), end - first


@triton.jit
def advance(ptr, strides, lengths, sequence, first, columns):
    """To these columns of an image, or of the sequence whose first token is `first`."""
    if lengths is None:
        return ptr + (sequence * strides[0] + columns)
    else:
        return ptr + (first * strides[1] + columns)


@triton.jit
def advance_statistics(ptr, lengths, head_index, head, first, tokens):
    if lengths is None:
        return ptr + head_index.to(tl.int64) * tokens
    else:
        return ptr + (head.to(tl.int64) * tokens + first)


@triton.jit
def advance_bias(bias, batch, head):
    """The bias of a head: pointer, strides of queries and of keys."""
    if bias is None:
        return
    else:
        return bias[0] + (batch * bias[1] + head * tl.cast(bias[2], tl.int64)), bias[3], bias[4]


@triton.jit
def seeded(dropout, head_index):
    """The seed itself, the rate, and which head this is."""
    if dropout is None:
        return
    else:
        return tl.load(dropout[0]), dropout[1], head_index


@triton.jit
def transposed(bias):
    if bias is None:
        return
    else:
        return bias[0], bias[2], bias[1]


@triton.jit
def load_bias(bias, first_row, rows, first_column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block of a bias, times log2(e), [ROWS, COLUMNS]; `bias` is a pointer and the strides of rows and columns."""
    if bias is None:
        return
    else:
        ptr, stride_row, stride_column = bias
        ptr += tl.cast(first_row, tl.int64) * stride_row + tl.cast(first_column, tl.int64) * stride_column
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        inside = (first_row + row < rows) & (first_column + column < columns)
        tile = tl.load(ptr + row * stride_row + column * stride_column, mask=inside, other=0)
        return tile.to(tl.float32) * 1.4426950408889634


@triton.jit
def halve(token):
    """A number that `token` and the token 8 further, or 8 back, have in common, and which of the two it is."""
    return token // 16 * 8 + token % 8, token // 8 % 2


@triton.jit
def draw_kept(dropout, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr):
    """Which probabilities dropout keeps, [ROWS, COLUMNS]: decided by seed, head, query and key, whatever the block.

    One call of Philox gives four random numbers: for two queries, 8 apart, and two keys, 8 apart. In the layout of a
    matrix product these four scores are in the same thread, in rows as in columns.
    """
    if dropout is None:
        return
    else:
        seed, rate, head_index = dropout
        if ROWS == 1:
            row, second_row = halve(first_row)
            column, second_column = halve(first_column + tl.arange(0, COLUMNS)[None, :])
        else:
            row = first_row // 2 + tl.arange(0, ROWS // 2)[:, None]
            column = first_column // 2 + tl.arange(0, COLUMNS // 2)[None, :]
        if ROWS_ARE_KEYS:
            a, c, b, d = tl.philox(seed, row, column, head_index, 0)
        else:
            a, b, c, d = tl.philox(seed, column, row, head_index, 0)
        if ROWS == 1:
            random = tl.where(second_column == 0, tl.where(second_row == 0, a, c), tl.where(second_row == 0, b, d))
        else:
            random = tl.join(tl.join(a, c), tl.join(b, d))  # [ROWS / 2, COLUMNS / 2, 2, 2]
            random = tl.reshape(random, ROWS // 16, 8, COLUMNS // 16, 8, 2, 2)
            random = tl.reshape(tl.permute(random, 0, 4, 1, 2, 5, 3), ROWS, COLUMNS)
        return tl.uint_to_uniform_float(random) >= rate


@triton.jit
def drop(weights, kept):
    """Not yet divided by the chance to be kept."""
    if kept is None:
        return weights
    else:
        return tl.where(kept, weights, 0.0)


@triton.jit
def kept_scale(dropout):
    """What kept probabilities are multiplied by."""
    if dropout is None:
        return
    else:
        return 1 / (1 - dropout[1])


@triton.jit
def base_2_scores(a, b, scale, bias):
    s = scores(a, b) * scale
    if bias is not None:
        s += bias
    return s


@triton.jit
def attend(q, k, v, inside, bias, kept, scale, top, weight, total):
    """One step of a softmax over blocks of keys: the largest score so far, the sum of weights, and of weighted values.

    All three refer to `top`, and shrink when it grows.
    """
    s = base_2_scores(q, k, scale, bias)  # [M, N]
    if inside is not None:
        s = tl.where(inside[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, axis=1))
    origin = new_top
    if bias is not None:  # the difference of two -inf is NaN
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s - origin[:, None])
    shrink = tl.exp2(top - origin)
    weight = weight * shrink + tl.sum(p, axis=1)
    total = add_weighted(scale_rows(total, shrink[:, None]), drop(p, kept), v)
    return new_top, weight, total


@triton.jit
def attend_rows(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    bias,
    dropout,
    first,
    queries,
    keys,
    stride_q,
    stride_k,
    stride_v,
    stride_out,
    scale,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    ANY_LENGTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of ROWS queries of one head, from `first` on, to all its keys."""
    q = load_rows(q_ptr, first, queries, stride_q, ROWS, MASKED, HEAD_DIM, PIECES)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.full([ROWS], 0.0, tl.float32)
    total = zero_rows(ROWS, PIECES)
    whole = keys // BLOCK_N * BLOCK_N
    if TAIL_N > 0:  # before the loop, see above
        tail_column = whole + tl.arange(0, TAIL_N)
        tail_k = load_rows(k_ptr, whole, keys, stride_k, TAIL_N, True, HEAD_DIM, PIECES)
        tail_v = load_rows(v_ptr, whole, keys, stride_v, TAIL_N, True, HEAD_DIM, PIECES)
        tail_bias = load_bias(bias, first, queries, whole, keys, ROWS, TAIL_N)
        tail_kept = draw_kept(dropout, first, whole, ROWS, TAIL_N, False)
        top, weight, total = attend(
            q, tail_k, tail_v, tail_column < keys, tail_bias, tail_kept, scale, top, weight, total
        )
    for key in tl.range(0, keys if ANY_LENGTH else whole, BLOCK_N, num_stages=STAGES):
        column = key + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, key, keys, stride_k, BLOCK_N, ANY_LENGTH, HEAD_DIM, PIECES)
        v = load_rows(v_ptr, key, keys, stride_v, BLOCK_N, ANY_LENGTH, HEAD_DIM, PIECES)
        inside = column < keys if ANY_LENGTH else None
        bias_block = load_bias(bias, first, queries, key, keys, ROWS, BLOCK_N)
        kept = draw_kept(dropout, first, key, ROWS, BLOCK_N, False)
        top, weight, total = attend(q, k, v, inside, bias_block, kept, scale, top, weight, total)
    if ANY_LENGTH or bias is not None:  # without keys, an output of 0 and an lse of inf
        top = tl.where(weight == 0, float("inf"), top)
        weight = tl.where(weight == 0, 1.0, weight)
    share = weight
    if dropout is not None:
        share *= 1 - dropout[1]
    store_rows(out_ptr, scale_rows(total, 1 / share[:, None]), first, queries, stride_out, HEAD_DIM, PIECES)
    row = first + tl.arange(0, ROWS)
    tl.store(lse_ptr + row, top + tl.log2(weight), mask=row < queries)


@triton.jit
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # out
    lse_ptr,  # out
    bias,
    dropout,
    lengths,
    tokens,
    keys,
    heads,
    q_strides,
    k_strides,
    v_strides,
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
    if keys is None:
        keys = tokens
    if k_strides is None:
        k_strides, v_strides = q_strides, q_strides
    whole = tokens // BLOCK_M
    blocks = whole + len(TAILS_M) if lengths is None else lengths[3]
    head_index, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, head = (head_index // heads).to(tl.int64), head_index % heads
    first_query, queries = span(lengths, 0, batch, tokens, tokens)
    first_key, keys = span(lengths, 1, batch, keys, 0)
    stride_out = heads * HEAD_DIM
    q_ptr = advance(q_ptr, q_strides, lengths, batch, first_query, head * HEAD_DIM)
    k_ptr = advance(k_ptr, k_strides, lengths, batch, first_key, head * HEAD_DIM)
    v_ptr = advance(v_ptr, v_strides, lengths, batch, first_key, head * HEAD_DIM)
    out_ptr += first_query * stride_out + head * HEAD_DIM
    lse_ptr = advance_statistics(lse_ptr, lengths, head_index, head, first_query, tokens)
    bias = advance_bias(bias, batch, head)
    dropout = seeded(dropout, head_index)
    stride_q, stride_k, stride_v = q_strides[1], k_strides[1], v_strides[1]
    # fmt: off
    if lengths is not None:
        for first in tl.range(block * BLOCK_M, queries, blocks * BLOCK_M):
            attend_rows(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias, dropout, first, queries, keys,
                        stride_q, stride_k, stride_v, stride_out, scale,
                        BLOCK_M, True, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, True, STAGES)
    else:
        if block < whole:
            attend_rows(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias, dropout, block * BLOCK_M, queries, keys,
                        stride_q, stride_k, stride_v, stride_out, scale,
                        BLOCK_M, False, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, False, STAGES)
        for t in tl.static_range(len(TAILS_M)):
            if block == whole + t:
                first = whole * BLOCK_M + first_of(TAILS_M, t)
                attend_rows(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias, dropout, first, queries, keys,
                            stride_q, stride_k, stride_v, stride_out, scale,
                            TAILS_M[t], TAILS_M[t] > 1, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, False, STAGES)
    # fmt: on


@triton.jit
def score_gradients(a, b, p, kept, dropout, delta):
    """Gradients of scores before they are scaled: probabilities p times (a b^T - delta), with delta to broadcast."""
    grad_p = scores(a, b)
    if kept is not None:
        grad_p = tl.where(kept, grad_p * kept_scale(dropout), 0.0)
    return p * (grad_p - delta)


@triton.jit
def add_query_gradient(grad_q, q, grad_out, lse, delta, k, v, inside, bias, kept, dropout, scale):
    """Adds the share of some keys."""
    p = tl.exp2(base_2_scores(q, k, scale, bias) - lse[:, None])  # [M, N]
    if inside is not None:
        p = tl.where(inside[None, :], p, 0.0)
    return add_weighted(grad_q, score_gradients(grad_out, v, p, kept, dropout, delta[:, None]), k)


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
    bias,
    dropout,
    first,
    queries,
    keys,
    stride_q,
    stride_k,
    stride_v,
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
    ANY_LENGTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of ROWS queries of one head, from `first` on."""
    row = first + tl.arange(0, ROWS)
    grad_out = load_rows(grad_out_ptr, first, queries, stride_grad_out, ROWS, MASKED, HEAD_DIM, PIECES)
    delta = row_dots(grad_out, load_rows(out_ptr, first, queries, stride_out, ROWS, MASKED, HEAD_DIM, PIECES))
    tl.store(delta_ptr + row, delta, mask=row < queries)
    lse = tl.load(lse_ptr + row, mask=row < queries, other=0)
    q = load_rows(q_ptr, first, queries, stride_q, ROWS, MASKED, HEAD_DIM, PIECES)
    grad_q = zero_rows(ROWS, PIECES)
    whole = keys // BLOCK_N * BLOCK_N
    # fmt: off
    if TAIL_N > 0:  # before the loop, see above
        tail_inside = whole + tl.arange(0, TAIL_N) < keys
        tail_k = load_rows(k_ptr, whole, keys, stride_k, TAIL_N, True, HEAD_DIM, PIECES)
        tail_v = load_rows(v_ptr, whole, keys, stride_v, TAIL_N, True, HEAD_DIM, PIECES)
        tail_bias = load_bias(bias, first, queries, whole, keys, ROWS, TAIL_N)
        tail_kept = draw_kept(dropout, first, whole, ROWS, TAIL_N, False)
        grad_q = add_query_gradient(grad_q, q, grad_out, lse, delta, tail_k, tail_v, tail_inside, tail_bias, tail_kept,
                                    dropout, scale)
    for key in tl.range(0, keys if ANY_LENGTH else whole, BLOCK_N, num_stages=STAGES):
        column = key + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, key, keys, stride_k, BLOCK_N, ANY_LENGTH, HEAD_DIM, PIECES)
        v = load_rows(v_ptr, key, keys, stride_v, BLOCK_N, ANY_LENGTH, HEAD_DIM, PIECES)
        inside = column < keys if ANY_LENGTH else None
        bias_block = load_bias(bias, first, queries, key, keys, ROWS, BLOCK_N)
        kept = draw_kept(dropout, first, key, ROWS, BLOCK_N, False)
        grad_q = add_query_gradient(grad_q, q, grad_out, lse, delta, k, v, inside, bias_block, kept, dropout, scale)
    # fmt: on
    store_rows(grad_q_ptr, scale_rows(grad_q, HEAD_DIM**-0.5), first, queries, stride_grad, HEAD_DIM, PIECES)


@triton.jit
def attention_bwd_query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_out_ptr,  # heads adjacent
    lse_ptr,
    delta_ptr,  # out: sums of grad_out * out over a head, for the kernels of keys and values and of the bias
    grad_q_ptr,  # out
    bias,
    dropout,
    lengths,
    tokens,
    keys,
    heads,
    q_strides,
    k_strides,
    v_strides,
    grad_out_strides,
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
    if keys is None:
        keys = tokens
    if k_strides is None:
        k_strides, v_strides = q_strides, q_strides
    whole = tokens // BLOCK_M
    blocks = whole + len(TAILS_M) if lengths is None else lengths[3]
    head_index, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, head = (head_index // heads).to(tl.int64), head_index % heads
    first_query, queries = span(lengths, 0, batch, tokens, tokens)
    first_key, keys = span(lengths, 1, batch, keys, 0)
    stride_out = heads * HEAD_DIM
    q_ptr = advance(q_ptr, q_strides, lengths, batch, first_query, head * HEAD_DIM)
    k_ptr = advance(k_ptr, k_strides, lengths, batch, first_key, head * HEAD_DIM)
    v_ptr = advance(v_ptr, v_strides, lengths, batch, first_key, head * HEAD_DIM)
    out_ptr += first_query * stride_out + head * HEAD_DIM
    grad_out_ptr = advance(grad_out_ptr, grad_out_strides, lengths, batch, first_query, head * HEAD_DIM)
    grad_q_ptr += first_query * stride_grad + head * HEAD_DIM
    lse_ptr = advance_statistics(lse_ptr, lengths, head_index, head, first_query, tokens)
    delta_ptr = advance_statistics(delta_ptr, lengths, head_index, head, first_query, tokens)
    bias = advance_bias(bias, batch, head)
    dropout = seeded(dropout, head_index)
    stride_q, stride_k, stride_v, stride_grad_out = q_strides[1], k_strides[1], v_strides[1], grad_out_strides[1]
    # fmt: off
    if lengths is not None:
        for first in tl.range(block * BLOCK_M, queries, blocks * BLOCK_M):
            query_gradient(q_ptr, k_ptr, v_ptr, out_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr, bias, dropout,
                           first, queries, keys, stride_q, stride_k, stride_v, stride_out, stride_grad_out,
                           stride_grad, scale, BLOCK_M, True, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, True, STAGES)
    else:
        if block < whole:
            query_gradient(q_ptr, k_ptr, v_ptr, out_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr, bias, dropout,
                           block * BLOCK_M, queries, keys, stride_q, stride_k, stride_v, stride_out, stride_grad_out,
                           stride_grad, scale, BLOCK_M, False, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, False, STAGES)
        for t in tl.static_range(len(TAILS_M)):
            if block == whole + t:
                first = whole * BLOCK_M + first_of(TAILS_M, t)
                query_gradient(q_ptr, k_ptr, v_ptr, out_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr, bias,
                               dropout, first, queries, keys, stride_q, stride_k, stride_v, stride_out,
                               stride_grad_out, stride_grad, scale,
                               TAILS_M[t], TAILS_M[t] > 1, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, False, STAGES)
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
    bias,
    dropout,
    first_key,
    keys,
    first,
    queries,
    stride_q,
    stride_grad_out,
    scale,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Adds the share of COLUMNS queries. Scores are transposed, [keys, queries], as the two sums over queries want."""
    ROWS: tl.constexpr = k[0].shape[0]
    row = first + tl.arange(0, COLUMNS)
    q = load_rows(q_ptr, first, queries, stride_q, COLUMNS, MASKED, HEAD_DIM, PIECES)
    grad_out = load_rows(grad_out_ptr, first, queries, stride_grad_out, COLUMNS, MASKED, HEAD_DIM, PIECES)
    lse = tl.load(lse_ptr + row, mask=row < queries, other=0)
    delta = tl.load(delta_ptr + row, mask=row < queries, other=0)
    bias_block = load_bias(transposed(bias), first_key, keys, first, queries, ROWS, COLUMNS)
    kept = draw_kept(dropout, first_key, first, ROWS, COLUMNS, True)
    # Beyond the tokens, columns have p = 1, but grad_out and delta are 0 there; rows may overflow, but are not stored.
    p = tl.exp2(base_2_scores(k, q, scale, bias_block) - lse[None, :])
    grad_v = add_weighted(grad_v, drop(p, kept), grad_out)
    grad_k = add_weighted(grad_k, score_gradients(v, grad_out, p, kept, dropout, delta[None, :]), q)
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
    bias,
    dropout,
    first,
    queries,
    keys,
    stride_q,
    stride_k,
    stride_v,
    stride_grad_out,
    stride_grad,
    scale,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    ANY_LENGTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of ROWS keys and values of one head, from `first` on."""
    k = load_rows(k_ptr, first, keys, stride_k, ROWS, MASKED, HEAD_DIM, PIECES)
    v = load_rows(v_ptr, first, keys, stride_v, ROWS, MASKED, HEAD_DIM, PIECES)
    grad_k, grad_v = zero_rows(ROWS, PIECES), zero_rows(ROWS, PIECES)
    whole = queries // BLOCK_N * BLOCK_N
    # fmt: off
    if TAIL_N > 0:  # before the loop, see above
        grad_k, grad_v = add_key_gradients(grad_k, grad_v, k, v, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, bias,
                                           dropout, first, keys, whole, queries, stride_q, stride_grad_out, scale,
                                           TAIL_N, True, HEAD_DIM, PIECES)
    for row in tl.range(0, queries if ANY_LENGTH else whole, BLOCK_N, num_stages=STAGES):
        grad_k, grad_v = add_key_gradients(grad_k, grad_v, k, v, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, bias,
                                           dropout, first, keys, row, queries, stride_q, stride_grad_out, scale,
                                           BLOCK_N, ANY_LENGTH, HEAD_DIM, PIECES)
    # fmt: on
    if dropout is not None:
        grad_v = scale_rows(grad_v, kept_scale(dropout))
    store_rows(grad_k_ptr, scale_rows(grad_k, HEAD_DIM**-0.5), first, keys, stride_grad, HEAD_DIM, PIECES)
    store_rows(grad_v_ptr, grad_v, first, keys, stride_grad, HEAD_DIM, PIECES)


@triton.jit
def attention_bwd_key_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,  # heads adjacent
    lse_ptr,
    delta_ptr,
    grad_k_ptr,  # out
    grad_v_ptr,  # out
    bias,
    dropout,
    lengths,
    tokens,
    keys,
    heads,
    q_strides,
    k_strides,
    v_strides,
    grad_out_strides,
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
    if keys is None:
        keys = tokens
    if k_strides is None:
        k_strides, v_strides = q_strides, q_strides
    whole = keys // BLOCK_M
    blocks = whole + len(TAILS_M) if lengths is None else lengths[3]
    head_index, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, head = (head_index // heads).to(tl.int64), head_index % heads
    first_query, queries = span(lengths, 0, batch, tokens, 0)
    first_key, keys = span(lengths, 1, batch, keys, keys)
    q_ptr = advance(q_ptr, q_strides, lengths, batch, first_query, head * HEAD_DIM)
    k_ptr = advance(k_ptr, k_strides, lengths, batch, first_key, head * HEAD_DIM)
    v_ptr = advance(v_ptr, v_strides, lengths, batch, first_key, head * HEAD_DIM)
    grad_out_ptr = advance(grad_out_ptr, grad_out_strides, lengths, batch, first_query, head * HEAD_DIM)
    gradients = first_key * stride_grad + head * HEAD_DIM
    grad_k_ptr += gradients
    grad_v_ptr += gradients
    lse_ptr = advance_statistics(lse_ptr, lengths, head_index, head, first_query, tokens)
    delta_ptr = advance_statistics(delta_ptr, lengths, head_index, head, first_query, tokens)
    bias = advance_bias(bias, batch, head)
    dropout = seeded(dropout, head_index)
    stride_q, stride_k, stride_v, stride_grad_out = q_strides[1], k_strides[1], v_strides[1], grad_out_strides[1]
    # fmt: off
    if lengths is not None:
        for first in tl.range(block * BLOCK_M, keys, blocks * BLOCK_M):
            key_gradients(q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, bias, dropout,
                          first, queries, keys, stride_q, stride_k, stride_v, stride_grad_out, stride_grad, scale,
                          BLOCK_M, True, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, True, STAGES)
    else:
        if block < whole:
            key_gradients(q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, bias, dropout,
                          block * BLOCK_M, queries, keys, stride_q, stride_k, stride_v, stride_grad_out, stride_grad,
                          scale, BLOCK_M, False, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, False, STAGES)
        for t in tl.static_range(len(TAILS_M)):
            if block == whole + t:
                first = whole * BLOCK_M + first_of(TAILS_M, t)
                key_gradients(q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, bias,
                              dropout, first, queries, keys, stride_q, stride_k, stride_v, stride_grad_out,
                              stride_grad, scale,
                              TAILS_M[t], TAILS_M[t] > 1, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, False, STAGES)
    # fmt: on


@triton.jit
def attention_bwd_bias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,  # heads adjacent
    lse_ptr,
    delta_ptr,
    grad_bias_ptr,  # out: float32 [shares, *the shape of the bias]
    bias,
    dropout,
    tokens,
    keys,
    heads,
    bias_heads,
    images_in_common,
    heads_in_common,
    shares,
    q_strides,
    k_strides,
    v_strides,
    grad_out_strides,
    scale,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program owns a block of a bias's gradient, in one of the shares of images and heads that have it in common."""
    if keys is None:
        keys = tokens
    if k_strides is None:
        k_strides, v_strides = q_strides, q_strides
    row_blocks, column_blocks = tl.cdiv(tokens, BLOCK_M), tl.cdiv(keys, BLOCK_N)
    owned, block = tl.program_id(0) // (row_blocks * column_blocks), tl.program_id(0) % (row_blocks * column_blocks)
    share, bias_index = owned % shares, owned // shares
    bias_batch, bias_head = bias_index // bias_heads, bias_index % bias_heads
    first, first_key = block // column_blocks * BLOCK_M, block % column_blocks * BLOCK_N
    row, column = first + tl.arange(0, BLOCK_M), first_key + tl.arange(0, BLOCK_N)
    total = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for i in tl.range(share, images_in_common * heads_in_common, shares, num_stages=STAGES):
        batch, head = bias_batch + i // heads_in_common, bias_head + i % heads_in_common
        head_index, batch = batch * heads + head, batch.to(tl.int64)
        # fmt: off
        q = load_rows(advance(q_ptr, q_strides, None, batch, 0, head * HEAD_DIM),
                      first, tokens, q_strides[1], BLOCK_M, True, HEAD_DIM, PIECES)
        k = load_rows(advance(k_ptr, k_strides, None, batch, 0, head * HEAD_DIM),
                      first_key, keys, k_strides[1], BLOCK_N, True, HEAD_DIM, PIECES)
        v = load_rows(advance(v_ptr, v_strides, None, batch, 0, head * HEAD_DIM),
                      first_key, keys, v_strides[1], BLOCK_N, True, HEAD_DIM, PIECES)
        grad_out = load_rows(advance(grad_out_ptr, grad_out_strides, None, batch, 0, head * HEAD_DIM),
                             first, tokens, grad_out_strides[1], BLOCK_M, True, HEAD_DIM, PIECES)
        # fmt: on
        statistics = head_index.to(tl.int64) * tokens + row
        lse = tl.load(lse_ptr + statistics, mask=row < tokens, other=0)
        delta = tl.load(delta_ptr + statistics, mask=row < tokens, other=0)
        bias_block = load_bias(advance_bias(bias, batch, head), first, tokens, first_key, keys, BLOCK_M, BLOCK_N)
        kept = draw_kept(seeded(dropout, head_index), first, first_key, BLOCK_M, BLOCK_N, False)
        p = tl.exp2(base_2_scores(q, k, scale, bias_block) - lse[:, None])
        total += score_gradients(grad_out, v, p, kept, dropout, delta[:, None])
    biases = tl.num_programs(0) // (row_blocks * column_blocks * shares)
    grad_bias_ptr += (share * biases + bias_index).to(tl.int64) * tokens * keys
    inside = (row < tokens)[:, None] & (column < keys)[None, :]
    tl.store(grad_bias_ptr + row.to(tl.int64)[:, None] * keys + column[None, :], total, mask=inside)
