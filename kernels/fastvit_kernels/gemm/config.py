"""Which products run in the Triton kernel, and with which tiles.

The rule is that nothing may be slower than PyTorch's best. A product whose Triton kernel has been measured faster on a
GPU is marked so in that GPU's table, see `tuning`; every other product is cuBLAS (hipBLASLt on AMD) with one fused
elementwise kernel after it. No GPU has measured any of them yet, so every product goes to cuBLAS, unless
`FASTVIT_KERNELS` says `gemm=triton`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastvit_kernels.dispatch import Gpu, asked_for, gpu
from fastvit_kernels.table import tunable

Product = Literal[
    "plain",  # x w^T + bias, without more
    "gelu",  # x w^T + bias, and its GELU
    "residual",  # residual + path_scale * layer_scale * (x w^T + bias)
    "input gradient",  # grad w
    "gelu gradient",  # grad w * GELU'(pre), its column sums, GELU(pre)
    "weight gradient",  # grad^T x
]
PRODUCTS: tuple[Product, ...] = get_args(Product)

_asked_for: frozenset[Product] | None = None


def runs_triton(product: Product, dtype: torch.dtype, device: torch.device, m: int, n: int, k: int) -> bool:
    """Whether the product [m, k] x [k, n] runs in the Triton kernel rather than in cuBLAS."""
    if _asked_for is not None:
        return product in _asked_for
    if (asked := asked_for("gemm")) != "auto":
        return asked == "triton"
    return tile(product, dtype, m, n, k, gpu(device)).beats_cublas


def forced() -> bool:
    """Whether `triton_for`, or a measurement of a tile, says what runs."""
    return _asked_for is not None or tile.forced is not None


@contextmanager
def triton_for(*products: Product) -> Iterator[None]:
    """Runs these products, and no others, in the Triton kernel inside: for tests, compilation and measurement."""
    global _asked_for
    before, _asked_for = _asked_for, frozenset(products)
    try:
        yield
    finally:
        _asked_for = before


def describable(matrix: Tensor) -> bool:
    """Whether the hardware can copy tiles of it by a descriptor: rows lie apart by a multiple of 16 bytes."""
    stride = matrix.stride(0)
    aligned = matrix.data_ptr() % 16 == 0 and stride * matrix.element_size() % 16 == 0
    return matrix.numel() > 0 and aligned and stride >= matrix.shape[1]


class Tile(NamedTuple):
    """Launch parameters of a matrix product, and whether Triton is to run it."""

    block_m: int
    block_n: int
    block_k: int
    parts: int  # column ranges that the epilogue takes one after the other
    stages: int
    warps: int
    group_m: int = 8
    descriptors: bool = False  # operands by tensor descriptors, which are TMA copies
    programs: int = 1  # at the same time on a multiprocessor
    flatten: bool = False  # the loops over tiles and over the inner dimension are one
    beats_cublas: bool = False  # measured faster than cuBLAS with an elementwise kernel


@tunable(Tile, "gemm_kernel", sizes=("m", "n", "k"))
def tile(product: Product, dtype: torch.dtype, m: int, n: int, k: int, on: Gpu) -> Tile:
    """Tiles that fit in the registers and shared memory of the GPU, found by `tuning.codegen`; speed is unmeasured."""
    arch = on.arch
    if arch == "interpreter":
        return Tile(32, 32, 32, parts=2, stages=1, warps=4, group_m=2, descriptors=True)
    if dtype == torch.float32:
        return Tile(64, 64, 32, parts=1, stages=2 if arch.startswith("gfx") else 3, warps=4)
    if arch.startswith("gfx"):
        return Tile(128, 128, 32, parts=1, stages=2, warps=8)
    capability = int(arch.removeprefix("sm_"))
    flatten = capability < 100  # on sm_100 the compiler then writes the epilogue twice
    if capability < 90:
        return Tile(128, 128, 64, parts=4, stages=3, warps=8, flatten=flatten)
    if product == "weight gradient":  # few tiles: smaller ones spread better over the multiprocessors
        return Tile(128, 128, 64, parts=4, stages=3, warps=8, descriptors=True, programs=2, flatten=flatten)
    return Tile(128, 256, 64, parts=8, stages=4, warps=8, descriptors=True, flatten=flatten)


class Block(NamedTuple):
    """What a program of an elementwise kernel takes, at a time."""

    rows: int
    columns: int
    num_warps: int


@tunable(Block, "gelu_fwd_kernel", sizes=("numbers",))
def gelu_block(dtype: torch.dtype, numbers: int, on: Gpu) -> Block:
    return Block(1, 2048, num_warps=4)  # of a tensor taken as one row


@tunable(Block, "residual_fwd_kernel", sizes=("rows", "width"))
def residual_block(dtype: torch.dtype, rows: int, width: int, on: Gpu) -> Block:
    return Block(16, 128, num_warps=4)


@tunable(Block, "gradient_kernel", sizes=("rows", "width"))
def gradient_block(dtype: torch.dtype, gelu: bool, rows: int, width: int, on: Gpu) -> Block:
    return Block(32, 128, num_warps=8)
