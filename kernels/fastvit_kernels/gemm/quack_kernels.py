"""QuACK's matrix product with GELU, or its gradient, in the epilogue: what runs on each number of the product.

Imported only if QuACK is installed. Its compiler calls the functions below once, with values that stand for one number
in float32, or on sm_100 for a pair of them. So the same text computes on anything that adds and multiplies.
"""

import math
from functools import cache
from typing import Any

import cutlass
import torch
from cutlass import cute
from quack.activation import sigmoid
from quack.epilogue import F2, gemm_epilogue
from quack.epilogue.math import pexp2
from quack.epilogue.ops import RowVecLoad, RowVecReduce
from quack.gemm_config import GemmConfig

STORED = {torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16}


@cache
def forward(tanh: bool, dtype: torch.dtype) -> Any:
    """`D` = A B + bias, `post` = its GELU.

    GELU takes the sum as it is stored, in 16 bits: so the backward pass, which reads that, computes the same GELU.
    """
    stored = STORED[dtype]

    def linear_gelu(acc: Any, bias: Any) -> dict[str, Any]:
        pre = each(acc + bias, lambda number: number.to(stored).to(cutlass.Float32))
        post, _ = gelu_and_slope(pre, tanh)
        return {"D": pre, "post": post}

    return gemm_epilogue(outputs=("post",), ops={"bias": RowVecLoad("bias")})(linear_gelu)


@cache
def backward(tanh: bool, recompute: bool, column_sums: bool) -> Any:
    """`D` = A B * GELU'(C); `post` = GELU(C) if `recompute`; `sums` of the columns of D in each row of tiles."""

    def gelu_gradient(acc: Any, c: Any) -> dict[str, Any]:
        post, slope = gelu_and_slope(c, tanh)
        grad = acc * slope
        result = {"D": grad}
        if recompute:
            result["post"] = post
        if column_sums:
            result["sums"] = grad
        return result

    return gemm_epilogue(
        outputs=("post",) if recompute else (), reduces={"sums": RowVecReduce("sums")} if column_sums else None
    )(gelu_gradient)


def gelu_and_slope(x: Any, tanh: bool) -> tuple[Any, Any]:
    """GELU and its derivative. Not QuACK's own tanh form, which takes the hardware's tanh, of 11 bits."""
    if tanh:  # x sigmoid(2 v), v = sqrt(2 / pi) (x + 0.044715 x^3)
        square, scale = x * x, 2 * math.sqrt(2 / math.pi)
        share = each(x * (square * (0.044715 * scale) + scale), sigmoid)
        return x * share, x * share * (1.0 - share) * (square * (3 * 0.044715 * scale) + scale) + share
    share = each(x * math.sqrt(0.5), lambda number: cute.math.erf(number, fastmath=True)) * 0.5 + 0.5
    density = pexp2(x * x * (-0.5 * math.log2(math.e))) * (1 / math.sqrt(2 * math.pi))
    return x * share, x * density + share


def each(x: Any, function: Any) -> Any:
    return F2(*(function(number) for number in x)) if isinstance(x, tuple) else function(x)


@cache
def configuration(tile_m: int, tile_n: int, pingpong: bool, cluster_m: int, cluster_n: int, capability: int) -> Any:
    """The same object for the same values, by which QuACK remembers how it launched."""
    return GemmConfig(
        tile_m=tile_m,
        tile_n=tile_n,
        pingpong=pingpong,
        is_dynamic_persistent=capability >= 10,
        cluster_m=cluster_m,
        cluster_n=cluster_n,
        device_capacity=capability,
    )
