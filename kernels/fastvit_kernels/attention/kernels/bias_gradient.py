"""The gradient of a bias: a sum over the images and heads that have it in common."""

import triton
import triton.language as tl

from fastvit_kernels.attention.kernels.backward import score_gradients
from fastvit_kernels.attention.kernels.options import base_2_scores, draw_kept, load_bias, locate_bias, seeded
from fastvit_kernels.attention.kernels.tiles import load_rows, locate, sees, strides_of


@triton.jit
def attention_bwd_bias_kernel(
    qkv,  # three pointers and their strides
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
    grad_out_strides,
    scale,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """A program owns a block of a bias's gradient, in one of the shares of images and heads that have it in common."""
    if keys is None:
        keys = tokens
    row_blocks, column_blocks = tl.cdiv(tokens, BLOCK_M), tl.cdiv(keys, BLOCK_N)
    owned, block = tl.program_id(0) // (row_blocks * column_blocks), tl.program_id(0) % (row_blocks * column_blocks)
    share, bias_index = owned % shares, owned // shares
    bias_image, bias_head = bias_index // bias_heads, bias_index % bias_heads
    first, first_key = block // column_blocks * BLOCK_M, block % column_blocks * BLOCK_N
    row, column = first + tl.arange(0, BLOCK_M), first_key + tl.arange(0, BLOCK_N)
    q_strides, k_strides, v_strides = strides_of(qkv)
    total = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for i in tl.range(share, images_in_common * heads_in_common, shares, num_stages=STAGES):
        image, head = bias_image + i // heads_in_common, bias_head + i % heads_in_common
        head_index, image = image * heads + head, image.to(tl.int64)
        q = locate(qkv[0], q_strides, None, image, 0, tokens, head * HEAD_DIM)
        k = locate(qkv[1], k_strides, None, image, 0, keys, head * HEAD_DIM)
        v = locate(qkv[2], v_strides, None, image, 0, keys, head * HEAD_DIM)
        grad_out = locate(grad_out_ptr, grad_out_strides, None, image, 0, tokens, head * HEAD_DIM)
        q_block = load_rows(q, first, BLOCK_M, True, HEAD_DIM, PIECES)
        k_block = load_rows(k, first_key, BLOCK_N, True, HEAD_DIM, PIECES)
        v_block = load_rows(v, first_key, BLOCK_N, True, HEAD_DIM, PIECES)
        grad_block = load_rows(grad_out, first, BLOCK_M, True, HEAD_DIM, PIECES)
        statistics = head_index.to(tl.int64) * tokens + row  # [BLOCK_M]
        lse = tl.load(lse_ptr + statistics, mask=row < tokens, other=0)
        delta = tl.load(delta_ptr + statistics, mask=row < tokens, other=0)
        bias_block = load_bias(locate_bias(bias, image, head), first, tokens, first_key, keys, BLOCK_M, BLOCK_N)
        kept = draw_kept(seeded(dropout, head_index), first, first_key, BLOCK_M, BLOCK_N, False)
        p = tl.exp2(base_2_scores(q_block, k_block, scale, bias_block) - lse[:, None])  # [BLOCK_M, BLOCK_N]
        if CAUSAL:
            p = tl.where(sees(first, tokens, first_key, keys, BLOCK_M, BLOCK_N), p, 0.0)
        total += score_gradients(grad_block, v_block, p, kept, dropout, delta[:, None])
    biases = tl.num_programs(0) // (row_blocks * column_blocks * shares)
    grad_bias_ptr += (share * biases + bias_index).to(tl.int64) * tokens * keys
    inside = (row < tokens)[:, None] & (column < keys)[None, :]
    tl.store(grad_bias_ptr + row.to(tl.int64)[:, None] * keys + column[None, :], total, mask=inside)
