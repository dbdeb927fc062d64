"""The backward kernels: gradients of queries, and of keys and values. Both compute the probabilities again."""

import triton
import triton.language as tl

from fastvit_kernels.attention.kernels.options import (
    base_2_scores,
    draw_kept,
    drop,
    kept_scale,
    load_bias,
    locate_bias,
    seeded,
    transposed,
)
from fastvit_kernels.attention.kernels.tiles import (
    add_weighted,
    first_of,
    load_rows,
    locate,
    locate_statistics,
    owned,
    row_dots,
    scale_rows,
    scores,
    sees,
    span,
    store_rows,
    strides_of,
    zero_rows,
)

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)  # `scale` has log2(e) in it, gradients have not


@triton.jit
def attention_bwd_query_kernel(
    qkv,  # three pointers and their strides
    out_ptr,
    grad_out_ptr,  # heads adjacent
    lse_ptr,
    delta_ptr,  # out: sums of grad_out * out over a head, for the kernels of keys and values and of the bias
    grad_q_ptr,  # out
    sums,  # out
    bias,
    dropout,
    lengths,
    tokens,
    keys,
    heads,
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
    CAUSAL: tl.constexpr,
):
    """A program owns the gradient of a block of queries of one head."""
    if keys is None:
        keys = tokens
    # Heads are next to each other, unlike in the other kernels: so the program's number says where its sums are.
    blocks = tokens // BLOCK_M + len(TAILS_M) if lengths is None else lengths[3]
    head, line = tl.program_id(0) % heads, tl.program_id(0) // heads
    block, image = line % blocks, line // blocks
    head_index, image = image * heads + head, image.to(tl.int64)
    first_query, queries = span(lengths, 0, image, tokens, tokens)
    first_key, keys = span(lengths, 1, image, keys, 0)
    column, width = head * HEAD_DIM, heads * HEAD_DIM
    q_strides, k_strides, v_strides = strides_of(qkv)
    q = locate(qkv[0], q_strides, lengths, image, first_query, queries, column)
    k = locate(qkv[1], k_strides, lengths, image, first_key, keys, column)
    v = locate(qkv[2], v_strides, lengths, image, first_key, keys, column)
    out = out_ptr + (first_query * width + column), width, queries
    grad_out = locate(grad_out_ptr, grad_out_strides, lengths, image, first_query, queries, column)
    grad_q = grad_q_ptr + (first_query * stride_grad + column), stride_grad, queries
    lse_ptr = locate_statistics(lse_ptr, lengths, head_index, head, first_query, tokens)
    delta_ptr = locate_statistics(delta_ptr, lengths, head_index, head, first_query, tokens)
    bias = locate_bias(bias, image, head)
    dropout = seeded(dropout, head_index)
    # fmt: off
    if lengths is not None:
        for first in tl.range(block * BLOCK_M, queries, blocks * BLOCK_M):
            query_gradient(q, k, v, out, grad_out, lse_ptr, delta_ptr, grad_q, sums, bias, dropout, first, scale,
                           BLOCK_M, True, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, True, STAGES, CAUSAL)
    else:
        whole = tokens // BLOCK_M
        if block < whole:
            query_gradient(q, k, v, out, grad_out, lse_ptr, delta_ptr, grad_q, sums, bias, dropout, block * BLOCK_M,
                           scale, BLOCK_M, False, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, CAUSAL, STAGES, CAUSAL)
        for t in tl.static_range(len(TAILS_M)):
            if block == whole + t:
                first = whole * BLOCK_M + first_of(TAILS_M, t)
                query_gradient(q, k, v, out, grad_out, lse_ptr, delta_ptr, grad_q, sums, bias, dropout, first, scale,
                               TAILS_M[t], TAILS_M[t] > 1, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, CAUSAL, STAGES, CAUSAL)
    # fmt: on


@triton.jit
def query_gradient(
    q,
    k,
    v,
    out,
    grad_out,
    lse_ptr,
    delta_ptr,
    grad_q,
    sums,
    bias,
    dropout,
    first,
    scale,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    ANY_LENGTH: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The gradient of ROWS queries of one head, from `first` on."""
    queries, keys = q[2], k[2]
    row = first + tl.arange(0, ROWS)  # [ROWS]
    own_grad = load_rows(grad_out, first, ROWS, MASKED, HEAD_DIM, PIECES)
    delta = row_dots(own_grad, load_rows(out, first, ROWS, MASKED, HEAD_DIM, PIECES))
    tl.store(delta_ptr + row, delta, mask=row < queries)
    store_sums(sums, 1, own_grad, HEAD_DIM, PIECES)
    lse = tl.load(lse_ptr + row, mask=row < queries, other=0)
    own = load_rows(q, first, ROWS, MASKED, HEAD_DIM, PIECES)
    total = zero_rows(ROWS, PIECES)
    whole = keys // BLOCK_N * BLOCK_N
    # fmt: off
    if TAIL_N > 0:
        total = add_query_gradient(total, own, own_grad, lse, delta, k, v, bias, dropout, first, queries, whole, keys,
                                   scale, TAIL_N, True, HEAD_DIM, PIECES, CAUSAL)
    end = keys if ANY_LENGTH else whole
    if CAUSAL:  # no further than the last of these queries sees
        end = tl.minimum(keys, first + ROWS + keys - queries)
    for key in tl.range(0, end, BLOCK_N, num_stages=STAGES):
        total = add_query_gradient(total, own, own_grad, lse, delta, k, v, bias, dropout, first, queries, key, keys,
                                   scale, BLOCK_N, ANY_LENGTH, HEAD_DIM, PIECES, CAUSAL)
    # fmt: on
    total = scale_rows(total, scale * LN_2)
    store_rows(grad_q, total, first, HEAD_DIM, PIECES)
    store_sums(sums, 0, total, HEAD_DIM, PIECES)


@triton.jit
def store_sums(sums, WHICH: tl.constexpr, tiles, HEAD_DIM: tl.constexpr, PIECES: tl.constexpr):
    """Stores the column sums of the program's block, if they are asked for. Behind the last row, it must be 0."""
    if sums is not None:
        # located here, so that no register holds the pointer before
        ptr = sums[WHICH] + tl.program_id(0).to(tl.int64) * HEAD_DIM
        for i in tl.static_range(len(PIECES)):
            column = first_of(PIECES, i) + tl.arange(0, PIECES[i])  # [PIECES[i]]
            tl.store(ptr + column, tl.sum(tiles[i].to(tl.float32), axis=0), mask=column < HEAD_DIM)


@triton.jit
def add_query_gradient(
    total,
    own,
    own_grad,
    lse,
    delta,
    k,
    v,
    bias,
    dropout,
    first,
    queries,
    key,
    keys,
    scale,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Adds the share of COLUMNS keys, from `key` on, to the gradient of the queries `own`."""
    ROWS: tl.constexpr = own[0].shape[0]
    k_block = load_rows(k, key, COLUMNS, MASKED, HEAD_DIM, PIECES)
    v_block = load_rows(v, key, COLUMNS, MASKED, HEAD_DIM, PIECES)
    bias_block = load_bias(bias, first, queries, key, keys, ROWS, COLUMNS)
    kept = draw_kept(dropout, first, key, ROWS, COLUMNS, False)
    p = tl.exp2(base_2_scores(own, k_block, scale, bias_block) - lse[:, None])  # [ROWS, COLUMNS]
    if MASKED:
        p = tl.where((key + tl.arange(0, COLUMNS) < keys)[None, :], p, 0.0)
    if CAUSAL:
        p = tl.where(sees(first, queries, key, keys, ROWS, COLUMNS), p, 0.0)
    return add_weighted(total, score_gradients(own_grad, v_block, p, kept, dropout, delta[:, None]), k_block)


@triton.jit
def score_gradients(a, b, p, kept, dropout, delta):
    """Gradients of scores before they are scaled: probabilities p times (a b^T - delta), with delta to broadcast."""
    grad_p = scores(a, b)
    if kept is not None:
        grad_p = tl.where(kept, grad_p * kept_scale(dropout), 0.0)
    return p * (grad_p - delta)


@triton.jit
def attention_bwd_key_kernel(
    qkv,  # three pointers and their strides
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
    CAUSAL: tl.constexpr,
):
    """A program owns the gradients of a block of keys and values of one head."""
    if keys is None:
        keys = tokens
    whole = keys // BLOCK_M
    head_index, image, head, block, blocks = owned(keys, heads, lengths, BLOCK_M, TAILS_M)
    first_query, queries = span(lengths, 0, image, tokens, 0)
    first_key, keys = span(lengths, 1, image, keys, keys)
    column = head * HEAD_DIM
    q_strides, k_strides, v_strides = strides_of(qkv)
    q = locate(qkv[0], q_strides, lengths, image, first_query, queries, column)
    k = locate(qkv[1], k_strides, lengths, image, first_key, keys, column)
    v = locate(qkv[2], v_strides, lengths, image, first_key, keys, column)
    grad_out = locate(grad_out_ptr, grad_out_strides, lengths, image, first_query, queries, column)
    gradients = first_key * stride_grad + column
    grad_k = grad_k_ptr + gradients, stride_grad, keys
    grad_v = grad_v_ptr + gradients, stride_grad, keys
    lse_ptr = locate_statistics(lse_ptr, lengths, head_index, head, first_query, tokens)
    delta_ptr = locate_statistics(delta_ptr, lengths, head_index, head, first_query, tokens)
    bias = locate_bias(bias, image, head)
    dropout = seeded(dropout, head_index)
    # fmt: off
    if lengths is not None:
        for first in tl.range(block * BLOCK_M, keys, blocks * BLOCK_M):
            key_gradients(q, k, v, grad_out, lse_ptr, delta_ptr, grad_k, grad_v, bias, dropout, first, scale,
                          BLOCK_M, True, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, True, STAGES, CAUSAL)
    else:
        if block < whole:
            key_gradients(q, k, v, grad_out, lse_ptr, delta_ptr, grad_k, grad_v, bias, dropout, block * BLOCK_M, scale,
                          BLOCK_M, False, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, CAUSAL, STAGES, CAUSAL)
        for t in tl.static_range(len(TAILS_M)):
            if block == whole + t:
                first = whole * BLOCK_M + first_of(TAILS_M, t)
                key_gradients(q, k, v, grad_out, lse_ptr, delta_ptr, grad_k, grad_v, bias, dropout, first, scale,
                              TAILS_M[t], TAILS_M[t] > 1, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, CAUSAL, STAGES, CAUSAL)
    # fmt: on


@triton.jit
def key_gradients(
    q,
    k,
    v,
    grad_out,
    lse_ptr,
    delta_ptr,
    grad_k,
    grad_v,
    bias,
    dropout,
    first,
    scale,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    ANY_LENGTH: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The gradients of ROWS keys and values of one head, from `first` on."""
    queries, keys = q[2], k[2]
    own_k = load_rows(k, first, ROWS, MASKED, HEAD_DIM, PIECES)
    own_v = load_rows(v, first, ROWS, MASKED, HEAD_DIM, PIECES)
    total_k, total_v = zero_rows(ROWS, PIECES), zero_rows(ROWS, PIECES)
    whole = queries // BLOCK_N * BLOCK_N
    # fmt: off
    if TAIL_N > 0:
        total_k, total_v = add_key_gradients(total_k, total_v, own_k, own_v, q, grad_out, lse_ptr, delta_ptr, bias,
                                             dropout, first, keys, whole, queries, scale,
                                             TAIL_N, True, HEAD_DIM, PIECES, CAUSAL)
    begin = 0
    if CAUSAL:  # with the first query that sees any of these keys
        begin = tl.maximum(0, first + queries - keys) // BLOCK_N * BLOCK_N
    for query in tl.range(begin, queries if ANY_LENGTH else whole, BLOCK_N, num_stages=STAGES):
        total_k, total_v = add_key_gradients(total_k, total_v, own_k, own_v, q, grad_out, lse_ptr, delta_ptr, bias,
                                             dropout, first, keys, query, queries, scale,
                                             BLOCK_N, ANY_LENGTH, HEAD_DIM, PIECES, CAUSAL)
    # fmt: on
    if dropout is not None:
        total_v = scale_rows(total_v, kept_scale(dropout))
    store_rows(grad_k, scale_rows(total_k, scale * LN_2), first, HEAD_DIM, PIECES)
    store_rows(grad_v, total_v, first, HEAD_DIM, PIECES)


@triton.jit
def add_key_gradients(
    total_k,
    total_v,
    own_k,
    own_v,
    q,
    grad_out,
    lse_ptr,
    delta_ptr,
    bias,
    dropout,
    first,
    keys,
    query,
    queries,
    scale,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Adds the share of COLUMNS queries, from `query` on, to the gradients of the keys and values owned.

    Scores are transposed, [keys, queries], as the two sums over queries want. To transpose a result of the matrix
    product instead would take a way through shared memory.
    """
    ROWS: tl.constexpr = own_k[0].shape[0]
    column = query + tl.arange(0, COLUMNS)  # [COLUMNS]
    q_block = load_rows(q, query, COLUMNS, MASKED, HEAD_DIM, PIECES)
    grad_block = load_rows(grad_out, query, COLUMNS, MASKED, HEAD_DIM, PIECES)
    lse = tl.load(lse_ptr + column, mask=column < queries, other=0)
    delta = tl.load(delta_ptr + column, mask=column < queries, other=0)
    bias_block = load_bias(transposed(bias), first, keys, query, queries, ROWS, COLUMNS)
    kept = draw_kept(dropout, first, query, ROWS, COLUMNS, True)
    # Behind the last query p is 1, but gradients and delta are 0. Behind the last key p may overflow: it is not stored.
    p = tl.exp2(base_2_scores(own_k, q_block, scale, bias_block) - lse[None, :])  # [ROWS, COLUMNS]
    if CAUSAL:  # sees(), transposed
        key = first + tl.arange(0, ROWS)  # [ROWS]
        p = tl.where(key[:, None] <= column[None, :] + (keys - queries), p, 0.0)
    total_v = add_weighted(total_v, drop(p, kept), grad_block)
    total_k = add_weighted(total_k, score_gradients(own_v, grad_block, p, kept, dropout, delta[None, :]), q_block)
    return total_k, total_v
