"""The forward kernel: a softmax over blocks of keys, and the sum of values that it weights."""

import triton
import triton.language as tl

from fastvit_kernels.attention.kernels.options import base_2_scores, draw_kept, drop, load_bias, locate_bias, seeded
from fastvit_kernels.attention.kernels.tiles import (
    add_weighted,
    first_of,
    load_rows,
    locate,
    locate_statistics,
    owned,
    scale_rows,
    sees,
    span,
    store_rows,
    strides_of,
    zero_rows,
)


@triton.jit
def attention_fwd_kernel(
    qkv,  # three pointers and their strides
    out_ptr,  # out
    lse_ptr,  # out
    bias,
    dropout,
    lengths,
    tokens,
    keys,
    heads,
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
    """A program owns a block of queries of one head."""
    if keys is None:
        keys = tokens
    head_index, image, head, block, blocks = owned(tokens, heads, lengths, BLOCK_M, TAILS_M)
    first_query, queries = span(lengths, 0, image, tokens, tokens)
    first_key, keys = span(lengths, 1, image, keys, 0)
    column, width = head * HEAD_DIM, heads * HEAD_DIM
    q_strides, k_strides, v_strides = strides_of(qkv)
    q = locate(qkv[0], q_strides, lengths, image, first_query, queries, column)
    k = locate(qkv[1], k_strides, lengths, image, first_key, keys, column)
    v = locate(qkv[2], v_strides, lengths, image, first_key, keys, column)
    out = out_ptr + (first_query * width + column), width, queries
    lse_ptr = locate_statistics(lse_ptr, lengths, head_index, head, first_query, tokens)
    bias = locate_bias(bias, image, head)
    dropout = seeded(dropout, head_index)
    # fmt: off
    if lengths is not None:
        for first in tl.range(block * BLOCK_M, queries, blocks * BLOCK_M):
            attend_rows(q, k, v, out, lse_ptr, bias, dropout, first, scale,
                        BLOCK_M, True, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, True, STAGES, CAUSAL)
    else:
        whole = tokens // BLOCK_M
        if block < whole:
            attend_rows(q, k, v, out, lse_ptr, bias, dropout, block * BLOCK_M, scale,
                        BLOCK_M, False, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, CAUSAL, STAGES, CAUSAL)
        for t in tl.static_range(len(TAILS_M)):
            if block == whole + t:
                first = whole * BLOCK_M + first_of(TAILS_M, t)
                attend_rows(q, k, v, out, lse_ptr, bias, dropout, first, scale,
                            TAILS_M[t], TAILS_M[t] > 1, HEAD_DIM, PIECES, BLOCK_N, TAIL_N, CAUSAL, STAGES, CAUSAL)
    # fmt: on


@triton.jit
def attend_rows(
    q,
    k,
    v,
    out,
    lse_ptr,
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
    """Attention of ROWS queries of one head, from `first` on, to all its keys."""
    queries, keys = q[2], k[2]
    own = load_rows(q, first, ROWS, MASKED, HEAD_DIM, PIECES)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.full([ROWS], 0.0, tl.float32)
    total = zero_rows(ROWS, PIECES)
    whole = keys // BLOCK_N * BLOCK_N
    # fmt: off
    if TAIL_N > 0:
        top, weight, total = attend(top, weight, total, own, k, v, bias, dropout, first, queries, whole, keys, scale,
                                    TAIL_N, True, HEAD_DIM, PIECES, CAUSAL)
    end = keys if ANY_LENGTH else whole
    if CAUSAL:  # no further than the last of these queries sees
        end = tl.minimum(keys, first + ROWS + keys - queries)
    for key in tl.range(0, end, BLOCK_N, num_stages=STAGES):
        top, weight, total = attend(top, weight, total, own, k, v, bias, dropout, first, queries, key, keys, scale,
                                    BLOCK_N, ANY_LENGTH, HEAD_DIM, PIECES, CAUSAL)
    # fmt: on
    if ANY_LENGTH or CAUSAL or bias is not None:  # without keys, an output of 0 and an lse of inf
        top = tl.where(weight == 0, float("inf"), top)
        weight = tl.where(weight == 0, 1.0, weight)
    share = weight
    if dropout is not None:
        share *= 1 - dropout[1]
    store_rows(out, scale_rows(total, 1 / share[:, None]), first, HEAD_DIM, PIECES)
    row = first + tl.arange(0, ROWS)
    tl.store(lse_ptr + row, top + tl.log2(weight), mask=row < queries)


@triton.jit
def attend(
    top,
    weight,
    total,
    own,
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
    """Takes COLUMNS keys, from `key` on, into the softmax of the queries `own`.

    Its state is the largest score so far, the sum of weights, and of weighted values: [ROWS], [ROWS], [ROWS, HEAD_DIM].
    Both sums refer to `top`, and shrink when it grows.
    """
    ROWS: tl.constexpr = own[0].shape[0]
    k_block = load_rows(k, key, COLUMNS, MASKED, HEAD_DIM, PIECES)
    v_block = load_rows(v, key, COLUMNS, MASKED, HEAD_DIM, PIECES)
    bias_block = load_bias(bias, first, queries, key, keys, ROWS, COLUMNS)
    kept = draw_kept(dropout, first, key, ROWS, COLUMNS, False)
    s = base_2_scores(own, k_block, scale, bias_block)  # [ROWS, COLUMNS]
    if MASKED:
        s = tl.where((key + tl.arange(0, COLUMNS) < keys)[None, :], s, float("-inf"))
    if CAUSAL:
        s = tl.where(sees(first, queries, key, keys, ROWS, COLUMNS), s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, axis=1))
    origin = new_top
    if CAUSAL or bias is not None:  # the difference of two -inf is NaN
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s - origin[:, None])
    shrink = tl.exp2(top - origin)
    weight = weight * shrink + tl.sum(p, axis=1)
    total = add_weighted(scale_rows(total, shrink[:, None]), drop(p, kept), v_block)
    return new_top, weight, total
