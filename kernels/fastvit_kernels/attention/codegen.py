"""The cases of attention for `tuning.codegen`: Vision Transformers at 224 and 336 pixels, a batch of 64."""

from collections.abc import Iterator
from functools import partial

import torch

from fastvit_kernels.attention.op import launch_backward, launch_forward
from fastvit_kernels.tuning.codegen import Case

KERNELS = ("attention_fwd_kernel", "attention_bwd_query_kernel", "attention_bwd_key_kernel")


def cases() -> Iterator[Case]:
    for name, tokens, heads, head_dim in [
        ("B/16", 197, 12, 64),
        ("L/16", 197, 16, 64),
        ("H/14", 257, 16, 80),
        ("H/14 at 336", 577, 16, 80),
        ("So400m/14", 256, 16, 72),
        ("g/14", 257, 16, 88),
        ("G/14", 257, 16, 104),
        ("128 a head", 1025, 16, 128),
    ]:
        yield Case(f"{name}: {tokens} tokens, {heads} x {head_dim}", partial(launch, tokens, heads, head_dim), KERNELS)
    yield Case("257 tokens, 16 x 80, float32", partial(launch, 257, 16, 80, torch.float32))


def launch(tokens: int, heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> None:
    qkv = torch.empty(64, tokens, 3, heads, head_dim, dtype=dtype, device="meta")
    out, lse = launch_forward(qkv)
    launch_backward(out, qkv, out, lse)
