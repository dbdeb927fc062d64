"""The cases of the SwiGLU MLP for `tuning.codegen`: DINOv2-g/14, both passes, on 64 images."""

from collections.abc import Iterator
from functools import partial

import torch

from fastvit_kernels.swiglu.op import gate, gate_gradient
from fastvit_kernels.tuning.codegen import Case

HALF, FULL = torch.bfloat16, torch.float32


def cases() -> Iterator[Case]:
    yield Case("DINOv2-g/14", partial(gates, HALF))
    yield Case("DINOv2-g/14, float32", partial(gates, FULL))


def gates(dtype: torch.dtype, tokens: int = 64 * 257, hidden: int = 4096) -> None:
    """The kernels of this folder; those of the normalisation and the products are compiled with their own."""
    pre, grad = meta(tokens, 2 * hidden, dtype=dtype), meta(tokens, hidden, dtype=dtype)
    gate(pre)
    gate_gradient(grad, pre, recompute=True, column_sum=True)


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
