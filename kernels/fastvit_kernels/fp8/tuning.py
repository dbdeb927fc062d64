"""What `fastvit_kernels.tuning` tries for FP8 products: torch._scaled_mm, the default, or tiles of a Triton kernel."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastvit_kernels.dispatch import Gpu
from fastvit_kernels.fp8.config import Fp8Tile, tile
from fastvit_kernels.fp8.products import multiply
from fastvit_kernels.fp8_scales.scales import E4M3
from fastvit_kernels.tuning.search import HALF, Case, Model


def cases(model: Model, on: Gpu) -> Iterator[Case]:
    """The three products of the four layers, [m, k] x [k, n], with either scaling; none for GPUs without FP8."""
    if on.arch not in ("sm_90", "sm_100"):
        return
    tokens, width, hidden = model.batch * model.tokens, model.width, 4 * model.width
    for layer, n, k in (
        ("qkv", 3 * width, width),
        ("proj", width, width),
        ("fc1", hidden, width),
        ("fc2", width, hidden),
    ):
        padded = -(-tokens // 16) * 16
        for product, exact, size in (
            ("forward", False, (tokens, n, k)),
            ("input gradient", True, (tokens, k, n)),
            ("weight gradient", True, (n, k, padded)),
        ):
            for by_rows in (False, True):
                name = f"{model.name} {layer}, {product}, a scale per {'row' if by_rows else 'tensor'}"
                default = tile.default(by_rows, exact, *size, on)._replace(beats_cublas=True)
                yield Case(
                    name,
                    tile,
                    (by_rows, exact, *size),
                    [default, *candidates(exact)],
                    partial(operands, by_rows, *size),
                    partial(multiply, bias=None, dtype=HALF, exact=exact),
                    ("fp8_gemm_kernel",),
                )


def candidates(exact: bool) -> list[Fp8Tile]:
    if exact:
        return [
            Fp8Tile(128, 128, 256, stages=2, warps=8, beats_cublas=True),
            Fp8Tile(128, 128, 128, stages=4, warps=8, beats_cublas=True),
        ]
    return [
        Fp8Tile(128, 256, 128, stages=4, warps=8, beats_cublas=True),
        Fp8Tile(128, 128, 128, stages=4, warps=8, beats_cublas=True),
        Fp8Tile(128, 128, 256, stages=3, warps=8, beats_cublas=True),
    ]


def operands(by_rows: bool, m: int, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values like those that are scaled to the range of E4M3, and inverses of their scales."""
    given: list[Tensor] = []
    for rows in (m, n):
        values = torch.randn(rows, k, device=device).mul_(64).clamp_(-448, 448).to(E4M3)
        given += [values, torch.full((rows if by_rows else 1,), 2.0**-8, device=device)]
    a, a_inverse, b, b_inverse = given
    return a, a_inverse, b, b_inverse
