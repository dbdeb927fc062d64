"""What `tuning.codegen` reads from a matrix product, for every target, and from one that spills on purpose."""

import torch
import triton
import triton.language as tl

from fastvit_kernels.tuning import codegen


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    a, b = tl.load(a_ptr + row * BLOCK + column), tl.load(b_ptr + row * BLOCK + column)
    tl.store(c_ptr + row * BLOCK + column, tl.dot(a, b).to(c_ptr.dtype.element_ty))


def read(target: str, **options: int) -> dict[str, int]:
    a = torch.empty(128, 128, dtype=torch.bfloat16, device="meta")
    with codegen.launches_compiled(codegen.TARGETS[target].compiler) as kernels:
        product_kernel[1,](a, a, a, BLOCK=128, num_warps=4, **options)
    return codegen.read(kernels[0], target)


def read_all() -> dict[str, dict[str, int]]:
    """By target; "few registers" is the one that spills."""
    return {target: read(target) for target in codegen.TARGETS} | {"few registers": read("sm_80", maxnreg=48)}
