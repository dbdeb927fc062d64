"""The cases of the SwiGLU MLP for `tuning.codegen`: DINOv2-g/14, both passes, on 64 images."""

from collections.abc import Iterator
from functools import partial

import torch

from fastvit_kernels.swiglu.op import Inputs, launch_backward, launch_forward
from fastvit_kernels.tuning.codegen import Case

HALF, FULL = torch.bfloat16, torch.float32


def cases() -> Iterator[Case]:
    yield Case("DINOv2-g/14", partial(half_block, HALF))
    yield Case("DINOv2-g/14, float32", partial(half_block, FULL))


def half_block(dtype: torch.dtype, tokens: int = 257, width: int = 1536, hidden: int = 4096) -> None:
    norm, layer_scale, path_scale = meta(width, dtype=dtype), meta(width, dtype=dtype), meta(64, dtype=FULL)
    fc1 = meta(2 * hidden, width, dtype=dtype), meta(2 * hidden, dtype=dtype)
    fc2 = meta(width, hidden, dtype=dtype), meta(width, dtype=dtype)
    inputs = Inputs(meta(64, tokens, width, dtype=dtype), norm, norm, *fc1, *fc2, layer_scale, path_scale)
    y, *kept = launch_forward(*inputs, 1e-6, True, True, False)
    launch_backward(y, *inputs, *kept, 1e-6, [True] * 8)


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
