"""The cases of the matrix products for `tuning.codegen`: the MLP of ViT-B/16, L/16 and H/14 on 64 images of 224 pixels.

Every product is compiled as the Triton kernel and as the elementwise kernels that accompany cuBLAS.
"""

from collections.abc import Iterator
from functools import partial

import torch

from fastvit_kernels.column_sums import ColumnSums
from fastvit_kernels.gemm import products
from fastvit_kernels.gemm.config import PRODUCTS, triton_for
from fastvit_kernels.tuning.codegen import Case

HALF, FULL = torch.bfloat16, torch.float32


def cases() -> Iterator[Case]:
    for model, tokens, width in (("B/16", 197, 768), ("L/16", 197, 1024), ("H/14", 257, 1280)):
        name, rows, hidden = f"ViT-{model}", 64 * tokens, 4 * width
        kernel = ("gemm_kernel",)
        yield Case(f"{name}, fc1 with GELU", partial(gelu, rows, width, hidden, False, True), kernel)
        yield Case(f"{name}, fc2 with residual", partial(residual, rows, hidden, width, True), kernel)
        yield Case(f"{name}, fc2 gradient with GELU'", partial(gelu_gradient, rows, hidden, width, False, True), kernel)
        yield Case(f"{name}, fc1 gradient", partial(input_gradient, rows, width, hidden), kernel)
        yield Case(f"{name}, fc1 weight gradient", partial(weight_gradient, rows, width, hidden), kernel)
        yield Case(f"{name}, qkv", partial(plain, rows, width, 3 * width), kernel)
    yield Case("H/14, fc1 with tanh GELU", partial(gelu, rows, width, hidden, True, True), kernel)
    yield Case("H/14, fc1 with GELU alone", partial(gelu, rows, width, hidden, False, True, keep_pre=False), kernel)
    yield Case("H/14, fc2 gradient with tanh GELU'", partial(gelu_gradient, rows, hidden, width, True, True), kernel)
    yield Case("H/14, fc1 with GELU, float32", partial(gelu, rows, width, hidden, False, True, FULL))
    yield Case("H/14, cuBLAS, GELU", partial(gelu, rows, width, hidden, False, False))
    yield Case("H/14, cuBLAS, tanh GELU", partial(gelu, rows, width, hidden, True, False))
    yield Case("H/14, cuBLAS, residual", partial(residual, rows, hidden, width, False))
    yield Case("H/14, cuBLAS, GELU'", partial(gelu_gradient, rows, hidden, width, False, False))
    yield Case("H/14, cuBLAS, tanh GELU'", partial(gelu_gradient, rows, hidden, width, True, False))
    yield Case("H/14, branch and LayerScale gradients", partial(layer_scale, rows, hidden, width))


def gelu(
    rows: int, width: int, out: int, tanh: bool, triton: bool, dtype: torch.dtype = HALF, keep_pre: bool = True
) -> None:
    with triton_for(*PRODUCTS if triton else ()):
        products.linear_gelu(
            meta(rows, width, dtype=dtype), meta(out, width, dtype=dtype), meta(out, dtype=dtype), tanh, keep_pre
        )


def residual(rows: int, width: int, out: int, triton: bool) -> None:
    scales = meta(out), meta(64, dtype=FULL)
    with triton_for(*PRODUCTS if triton else ()):
        products.linear_residual(meta(rows, width), meta(out, width), meta(out), meta(rows, out), *scales)


def gelu_gradient(rows: int, width: int, out: int, tanh: bool, triton: bool) -> None:
    with triton_for(*PRODUCTS if triton else ()):
        products.gelu_gradient(meta(rows, out), meta(out, width), meta(rows, width), tanh, True)


def input_gradient(rows: int, width: int, out: int) -> None:
    with triton_for(*PRODUCTS):
        products.input_gradient(meta(rows, out), meta(out, width))


def weight_gradient(rows: int, width: int, out: int) -> None:
    with triton_for(*PRODUCTS):
        products.weight_gradient(meta(rows, out), meta(rows, width))


def plain(rows: int, width: int, out: int) -> None:
    with triton_for(*PRODUCTS):
        products.linear(meta(rows, width), meta(out, width), meta(out))


def layer_scale(rows: int, width: int, out: int) -> None:
    grad = products.branch_gradient(meta(rows, out), meta(out), meta(64, dtype=FULL), HALF)
    sums, column_sum = ColumnSums(), meta(out, dtype=FULL)
    sums.add(grad.partial, column_sum)
    sums.launch()
    products.layer_scale_gradients(meta(out, width), meta(out, width), meta(out), meta(out), column_sum)


def meta(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
