"""The cases of layer normalisation for `tuning.codegen`: ViT widths, the dtypes of training, with and without a sum."""

from collections.abc import Iterator
from functools import partial

import torch

from fastvit_kernels.layer_norm.op import launch_backward, launch_forward
from fastvit_kernels.tuning.codegen import Case

HALF, FULL = torch.bfloat16, torch.float32


def cases() -> Iterator[Case]:
    for width in (192, 768, 1280, 1664):
        yield Case(f"{width}, bfloat16", partial(norm, width, HALF, HALF))
    yield Case("1280, bfloat16, parameters float32", partial(norm, 1280, HALF, FULL))
    yield Case("1280, float32", partial(norm, 1280, FULL, FULL))
    yield Case("1280, bfloat16, sum", partial(add_norm, 1280, scaled=False))
    yield Case("1280, bfloat16, sum with scales", partial(add_norm, 1280, scaled=True))


def norm(width: int, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    x, weight = meta(64, 257, width, dtype=dtype), meta(width, dtype=parameter_dtype)
    _, normed, mean, rstd = launch_forward(x, None, None, None, weight, weight, 1e-6)
    launch_backward(None, normed, x, None, dtype, None, None, weight, weight, mean, rstd)


def add_norm(width: int, scaled: bool) -> None:
    x, weight = meta(64, 257, width, dtype=HALF), meta(width, dtype=HALF)
    layer_scale, path_scale = (weight, meta(64, dtype=FULL)) if scaled else (None, None)
    y, normed, mean, rstd = launch_forward(x, x, layer_scale, path_scale, weight, weight, 1e-6)
    launch_backward(x, normed, y, x, x.dtype, layer_scale, path_scale, weight, weight, mean, rstd)


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
