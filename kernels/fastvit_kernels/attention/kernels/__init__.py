"""Triton kernels of attention: one forward, three backward. No program adds to what another writes.

Two splittings avoid padded matrix work. The head dimension is split into powers of two (80 = 64 + 16), so that rows of
one head are a tuple of matrices, one a piece. And tokens are split into whole blocks, which need no mask, and a tail:
for 257 tokens, 128 + 128 + 1 rows that programs own, against 64 + 64 + 64 + 64 + 16 columns that they stream. The
smallest matrix product of a Hopper GPU has 64 rows but may have 16 columns, which is why they differ; a single row
left over, the class token, is computed by vectors.

A program streams the tail before the whole blocks. If it came after that loop, which may run zero times, its
accumulators would be merged from two paths while a wgmma is in flight, and ptxas would serialise every product.

Queries, keys and values are [B, N, H, HEAD_DIM], heads adjacent. `qkv` is a tuple: their three pointers, then the
strides of images and of tokens, one pair for all three or one for each. Their gradients have tokens `stride_grad` apart
and adjacent images and heads. The output is contiguous [B, N, H, HEAD_DIM]. `lse` and `delta` are [B, H, N] float32, as
all statistics and sums are. `scale` is log2(e) times what scores are scaled by, as a rule 1 / sqrt(HEAD_DIM), so a
probability is 2 ** (scale * q k^T - lse). Products of float32 numbers are "ieee", never TF32.

What a call does not use is None, at compile time, and leaves no trace in the machine code:

- `keys`, the number of key tokens, if it is that of the queries;
- `bias`: a pointer and the strides of images, heads, queries and keys. It is added to the scaled q k^T;
- `dropout`: a pointer to a seed, and the rate. A probability is kept or not by seed, head, query and key alone;
- `lengths`, for B concatenated sequences of different lengths, tokens [T, H, HEAD_DIM] and statistics [H, T]: pointers
  to where the sequences of queries and of keys begin, int32 [B + 1], B, and the number of blocks that programs share in
  a sequence. Tokens behind the last sequence have no keys and no queries: output and gradients are 0 there;
- `sums`, in the backward kernel of queries: pointers to the partial column sums of the gradients of queries and of the
  output, [B * blocks, H * HEAD_DIM] float32 each. A program writes the part of its head in one row. Not with `lengths`.

If CAUSAL, the last query sees all keys, the one before it all but the last, and so on. What no query of a block sees is
skipped, and the rest is masked, a tail like a whole block: where the keys of a query end has nothing to do with it.

A query without keys, or with a bias of -inf for all of them, has an output of 0; its lse is inf, which makes every
probability 0.

Helpers that give None say `return`: to the compiler of Triton 3.6 a None is nothing, and cannot be part of a tuple.
"""

from fastvit_kernels.attention.kernels.backward import attention_bwd_key_kernel, attention_bwd_query_kernel
from fastvit_kernels.attention.kernels.bias_gradient import attention_bwd_bias_kernel
from fastvit_kernels.attention.kernels.forward import attention_fwd_kernel

__all__ = [
    "attention_bwd_bias_kernel",
    "attention_bwd_key_kernel",
    "attention_bwd_query_kernel",
    "attention_fwd_kernel",
]
