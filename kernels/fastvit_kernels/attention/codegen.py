"""The cases of attention for `tuning.codegen`: Vision Transformers at 224 and 336 pixels, a batch of 64."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastvit_kernels.attention.launch import (
    Call,
    fake_forward,
    launch_backward_and_sums,
    launch_forward,
    launch_gradients,
)
from fastvit_kernels.attention.relative import relative_bias
from fastvit_kernels.column_sums import ColumnSums
from fastvit_kernels.tuning.codegen import Case

KERNELS = ("attention_fwd_kernel", "attention_bwd_query_kernel", "attention_bwd_key_kernel")
BATCH = 64


def cases() -> Iterator[Case]:
    for name, tokens, heads, head_dim in [
        ("B/16", 197, 12, 64),
        ("L/16", 197, 16, 64),
        ("H/14", 257, 16, 80),
        ("H/14 at 336", 577, 16, 80),
        ("So400m/14", 256, 16, 72),
        ("So400m/14 at 336", 577, 16, 72),
        ("g/14", 257, 16, 88),
        ("G/14", 257, 16, 104),
        ("128 a head", 1025, 16, 128),
    ]:
        packed = Call(on_meta(BATCH, tokens, 3, heads, head_dim))
        yield Case(f"{name}: {tokens} tokens, {heads} x {head_dim}", partial(launch, packed), KERNELS)
    for name, tokens, heads, head_dim in [
        ("H/14 at 336", 577, 16, 80),  # those of smaller models are in the tables of the blocks
        ("So400m/14", 256, 16, 72),
        ("g/14", 257, 16, 88),
        ("G/14", 257, 16, 104),
    ]:
        qkv = on_meta(BATCH, tokens, 3, heads, head_dim)
        yield Case(f"{name}, bias of q, k and v", partial(launch_with_sums, qkv), KERNELS[1:2])
    yield Case(
        "257 tokens, 16 x 80, float32", partial(launch, Call(on_meta(BATCH, 257, 3, 16, 80, dtype=torch.float32)))
    )
    qkv = on_meta(BATCH, 257, 3, 16, 80)
    bias = on_meta(1, 16, 257, 257, dtype=torch.float32)
    seed = on_meta(1, dtype=torch.int64)
    yield Case(
        "CLIP's text, causal: 77 tokens, 8 x 64",
        partial(launch, Call(on_meta(BATCH, 77, 3, 8, 64), causal=True)),
        KERNELS,
    )
    of_text = partial(launch_with_sums, on_meta(BATCH, 77, 3, 8, 64), causal=True)
    yield Case("CLIP's text, causal, bias of q, k and v", of_text, KERNELS[1:2])
    yield Case("H/14, causal", partial(launch, Call(qkv, causal=True)), KERNELS)
    ends = on_meta(BATCH + 1, dtype=torch.int32)
    with_bias = (*KERNELS, "attention_bwd_bias_kernel")
    yield Case("H/14, bias", partial(launch, Call(qkv, bias=bias)), with_bias)
    yield Case("H/14, dropout", partial(launch, Call(qkv, seed=seed, dropout=0.1)), KERNELS)
    yield Case("H/14, bias, dropout", partial(launch, Call(qkv, bias=bias, seed=seed, dropout=0.1)), with_bias)
    of_base = on_meta(BATCH, 197, 3, 12, 64)
    relative = relative_bias(of_base.select(-3, 0), on_meta(2 * 197 - 1, 64))  # rows overlap, and are not aligned
    yield Case("B/16, relative positions", partial(launch, Call(of_base, bias=relative)), with_bias)
    lengths = Call(qkv.flatten(0, 1), None, None, None, None, 0.0, ends, ends, 257, 257)
    yield Case("H/14, lengths", partial(launch, lengths), KERNELS)
    yield Case("H/14, lengths, dropout", partial(launch, lengths._replace(seed=seed, dropout=0.1)), KERNELS)
    keys = on_meta(BATCH, 257, 16, 80)
    yield Case("H/14, one query", partial(launch, Call(on_meta(BATCH, 1, 16, 80), keys, keys)), KERNELS[2:])


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(call: Call) -> None:
    out, lse = launch_forward(*call)
    launch_gradients(out, out, lse, True, *call)


def launch_with_sums(qkv: Tensor, causal: bool = False) -> None:
    out, lse = fake_forward(qkv)
    launch_backward_and_sums(out, qkv, out, lse, qkv.new_empty(qkv[0, 0].numel()), ColumnSums(), causal)
