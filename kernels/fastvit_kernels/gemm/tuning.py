"""What `fastvit_kernels.tuning` tries for matrix products: cuBLAS, which is the default, or tiles of `gemm_kernel`.

The elementwise kernels that accompany cuBLAS come first, so that the products are compared with the best of them.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastvit_kernels.column_sums import ColumnSums
from fastvit_kernels.dispatch import Gpu
from fastvit_kernels.gemm import config, products, quack
from fastvit_kernels.gemm.config import Block, Product, Tile
from fastvit_kernels.gemm.quack import Pinned
from fastvit_kernels.tuning.search import HALF, Case, Model

BLOCKS = (
    Block(16, 128, 4),
    Block(32, 128, 4),
    Block(32, 128, 8),
    Block(64, 64, 8),
    Block(16, 256, 8),
    Block(8, 512, 8),
)


def cases(model: Model, on: Gpu) -> Iterator[Case]:
    rows, width, hidden = model.batch * model.tokens, model.width, 4 * model.width
    # fmt: off
    yield Case(f"{model.name} GELU", config.gelu_block, (HALF, rows * hidden),
               [Block(1, columns, warps) for columns in (1024, 2048, 4096) for warps in (4, 8)],
               partial(random, (rows, hidden)), partial(products.gelu, tanh=False), ("gelu_fwd_kernel",))
    yield Case(f"{model.name} GELU gradient", config.gradient_block, (HALF, True, rows, hidden), BLOCKS,
               partial(random, (rows, hidden), (rows, hidden)), gelu_gradient, ("gradient_kernel",))
    yield Case(f"{model.name} branch gradient", config.gradient_block, (HALF, False, rows, width), BLOCKS,
               partial(random, (rows, width)), branch_gradient, ("gradient_kernel",))
    yield Case(f"{model.name} residual", config.residual_block, (HALF, rows, width), BLOCKS,
               partial(random, (rows, 16), (width, 16), (width,), (rows, width)),  # after a product of next to no depth
               residual, ("residual_fwd_kernel",))
    # fmt: on
    qkv, proj, fc1, fc2 = (3 * width, width), (width, width), (hidden, width), (width, hidden)  # [out, in]
    layers: list[tuple[str, Product, Product, tuple[int, int]]] = [
        ("fc2", "residual", "gelu gradient", fc2),
        ("fc1", "gelu", "input gradient", fc1),
        ("qkv", "plain", "input gradient", qkv),
        ("proj", "residual", "input gradient", proj),
    ]
    for layer, forward, backward, (n, k) in layers:
        yield product(f"{model.name} {layer}", forward, (rows, n, k), on)
        yield product(f"{model.name} {layer}", backward, (rows, k, n), on)
        yield product(f"{model.name} {layer}", "weight gradient", (n, k, rows), on)
    # what runs each of these two otherwise has been tuned by now
    yield in_quack(f"{model.name} fc1, GELU in QuACK", "gelu", (rows, hidden, width), on)
    yield in_quack(f"{model.name} fc2, GELU gradient in QuACK", "gelu gradient", (rows, hidden, width), on)


def product(layer: str, product: Product, size: tuple[int, int, int], on: Gpu) -> Case:
    launch, shapes = LAUNCHES[product]
    key = (product, HALF, *size)
    make = partial(random, *shapes(*size))
    default = config.tile.default(*key, on)._replace(beats_cublas=True)
    return Case(f"{layer}, {product}", config.tile, key, [default, *candidates(on)], make, launch, ("gemm_kernel",))


def in_quack(name: str, product: Product, size: tuple[int, int, int], on: Gpu) -> Case:
    """Whether QuACK runs a product faster than what runs it otherwise, and how."""
    launch, shapes = LAUNCHES[product]
    make = partial(random, *shapes(*size))
    return Case(name, quack.pinned, (product, HALF, *size), quack_candidates(product, on), make, launch, ())


def quack_candidates(product: Product, on: Gpu) -> list[Pinned]:
    """Of those that QuACK tries itself, such as spill no registers, see `benchmarks.quack_codegen`."""
    if on.arch == "sm_90":
        tiles = [(128, 160, True), (256, 128, False), (128, 256, False), (128, 128, True)]
        ways = [Pinned(*tile, 2, 1, runs=True) for tile in tiles]
    elif on.arch == "sm_100":
        columns = (128, 192, 256) if product == "gelu" else (128,)
        ways = [Pinned(256, width, False, 2, 1, runs=True) for width in columns]
    else:
        return []
    if product == "gelu":
        return ways
    return [way._replace(column_sums=inside) for way in ways for inside in (True, False)]


def candidates(on: Gpu) -> list[Tile]:
    def tile(m: int, n: int, k: int, parts: int, stages: int, warps: int, group_m: int = 8) -> Tile:
        return Tile(m, n, k, parts, stages, warps, group_m, not old, beats_cublas=True)

    old = on.arch.startswith("gfx") or int(on.arch.removeprefix("sm_")) < 90  # no tensor descriptors
    if on.arch.startswith("gfx"):
        return [tile(128, 128, 32, 1, 2, 8), tile(128, 128, 64, 1, 1, 8), tile(256, 128, 32, 1, 2, 8)]
    if old:
        return [tile(128, 128, 64, 4, 3, 8), tile(128, 128, 32, 4, 4, 4), tile(128, 256, 32, 8, 3, 8)]
    return [
        tile(128, 256, 64, 8, 3, 8),  # the largest that fits
        tile(128, 256, 64, 8, 3, 8, group_m=16),
        tile(256, 128, 64, 8, 3, 8),
        tile(128, 128, 64, 4, 4, 8),  # more tiles, hence a fuller last wave
        tile(128, 128, 64, 4, 4, 4),
    ]


def random(*shapes: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Of standard deviation 0.2, so that products of a depth of 1000 have one of about 1, like activations."""
    return tuple(torch.randn(shape, dtype=HALF, device=device).mul_(0.2) for shape in shapes)


def gelu_gradient(grad: Tensor, pre: Tensor) -> tuple[Tensor, ...]:
    out, post = torch.empty_like(grad), torch.empty_like(pre)
    return out, post, column_sums(products.scale_gradient(grad, out, pre=pre, post=post))


def branch_gradient(grad: Tensor) -> Tensor:
    return column_sums(products.scale_gradient(grad, None))


def column_sums(partial_sums: Tensor) -> Tensor:
    sums, total = ColumnSums(), partial_sums.new_empty(partial_sums.shape[1], dtype=HALF)
    sums.add(partial_sums, total)
    sums.launch()
    return total


def product_and_gelu_gradient(grad: Tensor, weight: Tensor, pre: Tensor) -> tuple[Tensor, ...]:
    """With the column sums added up, since how many rows of partial ones there are depends on the tile."""
    out, partial_sums, post = products.gelu_gradient(grad, weight, pre, tanh=False, recompute=True)
    return out, column_sums(partial_sums), post


def residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return products.linear_residual(x, weight, bias, residual, None, None)


# What runs a product [m, k] x [k, n] as training does, and the shapes of its inputs.
LAUNCHES: dict[Product, tuple[Callable[..., object], Callable[[int, int, int], tuple[tuple[int, ...], ...]]]] = {
    "plain": (products.linear, lambda m, n, k: ((m, k), (n, k), (n,))),
    "gelu": (partial(products.linear_gelu, tanh=False), lambda m, n, k: ((m, k), (n, k), (n,))),
    "residual": (residual, lambda m, n, k: ((m, k), (n, k), (n,), (m, n))),
    "input gradient": (products.input_gradient, lambda m, n, k: ((m, k), (k, n))),
    "gelu gradient": (product_and_gelu_gradient, lambda m, n, k: ((m, k), (k, n), (m, n))),
    "weight gradient": (products.weight_gradient, lambda m, n, k: ((k, m), (k, n))),
}
