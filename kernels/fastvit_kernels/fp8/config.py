"""Which FP8 products run in the Triton kernel, and with which tiles.

`torch._scaled_mm`, which is cuBLAS, or CUTLASS with a scale per row, runs those that no table of a GPU says otherwise
of, unless `FASTVIT_KERNELS` says `gemm=triton`.
"""

from typing import NamedTuple

from fastvit_kernels.dispatch import Gpu
from fastvit_kernels.table import tunable


class Fp8Tile(NamedTuple):
    """Launch parameters of an FP8 product, and whether Triton is to run it."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    group_m: int = 8
    descriptors: bool = True  # operands by tensor descriptors, which are TMA copies
    beats_cublas: bool = False  # measured faster than torch._scaled_mm


@tunable(Fp8Tile, "fp8_gemm_kernel", sizes=("m", "n", "k"))
def tile(by_rows: bool, exact: bool, m: int, n: int, k: int, on: Gpu) -> Fp8Tile:
    """Tiles that fit in the registers and shared memory of the GPU, found by `tuning.codegen`; speed is unmeasured."""
    if on.arch == "interpreter":
        return Fp8Tile(32, 32, 32, stages=1, warps=4, group_m=2)
    # a sum of 256 products, and what it is added to in float32, are there at once; on sm_100 scales per row spill
    exact = exact or (by_rows and on.arch == "sm_100")
    return Fp8Tile(128, 128, 256, stages=3, warps=8) if exact else Fp8Tile(128, 256, 128, stages=3, warps=8)
