"""GELU and its gradient inside matrix products of QuACK, an optional library for Hopper and Blackwell GPUs.

What these functions take and return is what `products` does; QuACK runs where `FASTVIT_KERNELS` asks for `gemm=quack`,
or where the table of the GPU says that it was measured to be faster than what runs otherwise.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit_kernels import dispatch
from fastvit_kernels.dispatch import Gpu, asked_for, gpu, refusal
from fastvit_kernels.gemm import config
from fastvit_kernels.gemm.config import Product, describable
from fastvit_kernels.libraries import QUACK, quack_obstacle
from fastvit_kernels.registration import cdiv
from fastvit_kernels.table import tunable

PRODUCTS: tuple[Product, ...] = ("gelu", "gelu gradient")  # the others are never QuACK's


class Pinned(NamedTuple):
    """How QuACK runs a product, which it would otherwise search for itself, and whether it is to run it."""

    tile_m: int
    tile_n: int
    pingpong: bool  # on sm_90: two groups of warps, each with a tile of its own, take turns at product and epilogue
    cluster_m: int
    cluster_n: int
    column_sums: bool = True  # in the epilogue, if they are asked for; else in a pass over the result
    runs: bool = False  # measured faster than what runs otherwise


@tunable(Pinned, "quack_gemm", sizes=("m", "n", "k"), library=QUACK)
def pinned(product: Product, dtype: torch.dtype, m: int, n: int, k: int, on: Gpu) -> Pinned:
    """The widest tile whose epilogues spill no registers, see `benchmarks.quack_codegen`."""
    if on.arch == "sm_100":
        return Pinned(256, 128, False, 2, 1)
    return Pinned(128, 160, True, 2, 1)


class Call(NamedTuple):
    """A product [m, k] x [k, n] with its epilogue, as `launch` hands it to QuACK."""

    product: Product
    tanh: bool
    a: Tensor  # [m, k]
    b: Tensor  # [k, n], a view of a weight
    operand: Tensor  # bias [n], or GELU's input [m, n]
    out: Tensor | None  # [m, n]: GELU's input, or its gradient
    post: Tensor | None  # [m, n]: its output
    sums: Tensor | None  # [tiles, n] float32
    pinned: Pinned

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.a, self.b, self.operand, self.out, self.post, self.sums


def chosen(product: Product, m: int, n: int, k: int, *matrices: Tensor) -> Pinned | None:
    """How QuACK runs this product of `matrices`, or None. The first matrix gives dtype and device.

    Raises RuntimeError if it was asked for and cannot.
    """
    asked = asked_for("gemm")
    if asked not in ("auto", "quack") or config.forced():
        return None
    first = matrices[0]
    on = gpu(first.device)
    how = pinned(product, first.dtype, m, n, k, on)
    if asked == "auto" and not how.runs:
        return None
    reason = obstacle(on, matrices)
    if reason is None:
        return how
    if asked == "quack" or pinned.forced is not None:
        raise RuntimeError(refusal(first, reason) if asked == "quack" else reason)
    warn(f"the table of {on.name} has QuACK run matrix products with GELU, but {reason}: cuBLAS runs them")
    return None


def obstacle(on: Gpu, matrices: tuple[Tensor, ...]) -> str | None:
    """Why QuACK cannot multiply these, or None."""
    if matrices[0].dtype not in (torch.bfloat16, torch.float16):
        return f"QuACK takes bfloat16 and float16, not {matrices[0].dtype}"
    if not all(describable(matrix) for matrix in matrices):
        return "QuACK takes no empty matrices, and only rows that start at multiples of 16 bytes"
    if _instead is not None:
        return None
    if not dispatch.is_on_gpu(matrices[0]):
        return f"QuACK runs on an NVIDIA GPU, not on {matrices[0].device}"
    return quack_obstacle(on.arch)


@cache
def warn(sentence: str) -> None:
    """Warns once per process."""
    warnings.warn(sentence, stacklevel=2)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, tanh: bool, keep_pre: bool, how: Pinned
) -> tuple[Tensor, Tensor]:
    """As `products.linear_gelu`."""
    shape = x.shape[0], weight.shape[0]
    pre, post = x.new_empty(shape if keep_pre else 0), x.new_empty(shape)
    launch(Call("gelu", tanh, x, weight.T, aligned(bias), pre if keep_pre else None, post, None, how))
    return pre, post


def gelu_gradient(
    grad: Tensor, weight: Tensor, pre: Tensor, tanh: bool, recompute: bool, column_sum: bool, how: Pinned
) -> tuple[Tensor, Tensor, Tensor]:
    """As `products.gelu_gradient`, but without column sums unless they are the epilogue's, `Pinned.column_sums`."""
    grad_pre, post = torch.empty_like(pre), pre.new_empty(pre.shape if recompute else 0)
    in_epilogue = column_sum and how.column_sums
    tiles = cdiv(pre.shape[0], rows_of_tile(how, gpu(pre.device)))
    sums = pre.new_empty((tiles, pre.shape[1]) if in_epilogue else 0, dtype=torch.float32)
    launch(
        Call(
            "gelu gradient",
            tanh,
            grad,
            weight,
            pre,
            grad_pre,
            post if recompute else None,
            sums if in_epilogue else None,
            how,
        )
    )
    return grad_pre, sums, post


def aligned(vector: Tensor) -> Tensor:
    """The vector, or a copy at an address that is a multiple of 16 bytes."""
    return vector if vector.data_ptr() % 16 == 0 else vector.clone()


def rows_of_tile(how: Pinned, on: Gpu) -> int:
    """On sm_100, two multiprocessors of a pair share a tile, and each adds up the columns of its half."""
    return how.tile_m // 2 if on.arch == "sm_100" and how.cluster_m % 2 == 0 else how.tile_m


class Prepared(NamedTuple):
    """A call in QuACK's terms: an epilogue, which is an `EpiMod`, and what it takes."""

    epilogue: Any
    matrices: tuple[Tensor, Tensor, Tensor | None]  # A, B and C
    out: dict[str, Tensor]
    config: Any  # a `GemmConfig`
    operands: dict[str, Tensor]


def prepared(call: Call) -> Prepared:
    from fastvit_kernels.gemm import quack_kernels as kernels  # noqa: PLC0415 - imports QuACK

    how, capability = call.pinned, int(gpu(call.a.device).arch.removeprefix("sm_")) // 10
    pins = kernels.configuration(how.tile_m, how.tile_n, bool(how.pingpong), how.cluster_m, how.cluster_n, capability)
    out = {name: tensor for name, tensor in (("D", call.out), ("post", call.post)) if tensor is not None}
    if call.product == "gelu":
        epilogue = kernels.forward(call.tanh, call.a.dtype)
        return Prepared(epilogue, (call.a, call.b, None), out, pins, {"bias": call.operand[None]})
    epilogue = kernels.backward(call.tanh, call.post is not None, call.sums is not None)
    sums = {} if call.sums is None else {"sums": call.sums}
    return Prepared(epilogue, (call.a, call.b, call.operand), out, pins, sums)


def launch(call: Call) -> None:
    if _instead is not None:
        return _instead(call)
    epilogue, matrices, out, pins, operands = prepared(call)
    # not tuned: QuACK would search by itself, on each rank, while the model runs
    epilogue(*matrices, out=out, store_d="D" in out, config=pins, tuned=False, **operands)
    return None


_instead: Callable[[Call], None] | None = None


@contextmanager
def launched_by(instead: Callable[[Call], None]) -> Iterator[None]:
    """Inside, a launch calls `instead`, and QuACK need not be here: for counting what would be launched."""
    global _instead
    before, _instead = _instead, instead
    try:
        yield
    finally:
        _instead = before
