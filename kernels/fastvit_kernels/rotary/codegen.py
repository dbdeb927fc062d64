"""The cases of rotation and normalisation for `tuning.codegen`: both passes, on 64 images."""

from collections.abc import Iterator
from functools import partial

import torch

from fastvit_kernels.rotary.op import launch_backward, launch_forward
from fastvit_kernels.tuning.codegen import Case

HALF, FULL = torch.bfloat16, torch.float32


def cases() -> Iterator[Case]:
    yield Case("DINOv3-L/16, 224 pixels", partial(packed, 201, 5, 16, 64, norm=False, interleaved=False))
    yield Case("EVA-02-L/14, 448 pixels", partial(packed, 1025, 1, 16, 64, norm=False, interleaved=True))
    yield Case("ViT-H/14 with both", partial(packed, 257, 1, 16, 80, norm=True, interleaved=False))
    yield Case("ViT-H/14 with both, float32", partial(packed, 257, 1, 16, 80, norm=True, interleaved=False, dtype=FULL))
    yield Case("q and k apart, RMS", partial(apart, 257, 16, 64))


def packed(
    tokens: int, prefix: int, heads: int, head_dim: int, *, norm: bool, interleaved: bool, dtype: torch.dtype = HALF
) -> None:
    qkv = meta(64, tokens, 3, heads, head_dim, dtype=dtype)
    angles = meta(tokens - prefix, head_dim, dtype=FULL), meta(tokens - prefix, head_dim, dtype=FULL)
    weight = meta(head_dim, dtype=dtype) if norm else None
    call = (*angles, weight, weight, weight, weight, prefix, interleaved, False, 1e-6)
    out, _ = launch_forward(qkv, None, *call)
    launch_backward(out, None, qkv if norm else None, None, *call)


def apart(tokens: int, heads: int, head_dim: int) -> None:
    q, weight = meta(64, tokens, heads, head_dim, dtype=HALF), meta(head_dim, dtype=HALF)
    call = None, None, weight, None, weight, None, 0, False, True, 1e-6
    q_out, k_out = launch_forward(q, q, *call)
    launch_backward(q_out, k_out, q, q, *call)


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
