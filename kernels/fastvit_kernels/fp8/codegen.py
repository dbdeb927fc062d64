"""The cases of FP8 for `tuning.codegen`: layers of ViT-B/16 and H/14 on 64 images, and the passes before them.

GPUs before Hopper have no FP8 products, and those of AMD other formats: for them there is one pass alone.
"""

from collections.abc import Iterator
from functools import partial

import torch

from fastvit_kernels import dispatch
from fastvit_kernels.fp8.passes import gelu
from fastvit_kernels.fp8.products import Layer
from fastvit_kernels.fp8.setting import Fp8, Scaling
from fastvit_kernels.gemm.products import scale_gradient
from fastvit_kernels.layer_norm.op import normalise
from fastvit_kernels.tuning.codegen import Case

HALF = torch.bfloat16
WITH_FP8 = ("sm_90", "sm_100")


def cases() -> Iterator[Case]:
    for name, rows, width in (("ViT-B/16", 64 * 197, 768), ("ViT-H/14", 64 * 257, 1280)):
        for scaling in ("tensor", "row"):
            case = partial(Case, targets=WITH_FP8)
            yield case(f"{name}, fc1, a scale per {scaling}", partial(layer, scaling, rows, width, 4 * width, False))
            in_triton = partial(layer, scaling, rows, width, 4 * width, True)
            kernels = ("fp8_gemm_kernel",)
            yield case(f"{name}, fc1, a scale per {scaling}, in Triton", in_triton, matrix_kernels=kernels)
            yield case(f"{name}, passes, a scale per {scaling}", partial(passes, scaling, rows, width))
    yield Case("ViT-H/14, LayerNorm, a scale per tensor", partial(norm, "tensor", rows, width))


def layer(scaling: Scaling, rows: int, width: int, out: int, triton: bool) -> None:
    """The three products, with quantisation by passes of their own."""
    x, weight, bias, grad = meta(rows, width), meta(out, width), meta(out), meta(rows, out)
    one = Layer(Fp8(scaling), "fc1", weight, learns=True, passes_on=True)
    with dispatch.using("auto,gemm=triton" if triton else "auto"):
        one.forward(x, bias)
        one.input_gradient(grad)
        one.weight_gradient(grad, x)


def passes(scaling: Scaling, rows: int, width: int) -> None:
    """LayerNorm, GELU and its gradient."""
    norm(scaling, rows, width)
    fp8, pre, weight = Fp8(scaling), meta(rows, 4 * width), meta(width, 4 * width)
    handoff = Layer(fp8, "fc2", weight).handoff(pre)
    gelu(pre, False, handoff, keep=False)
    maxima = Layer(fp8, "fc1", weight, learns=True, passes_on=True).gradient_maxima(pre)
    scale_gradient(pre, pre, pre=pre, post=torch.empty_like(pre), maxima=maxima)


def norm(scaling: Scaling, rows: int, width: int) -> None:
    x = meta(rows, width)
    handoff = Layer(Fp8(scaling), "fc1", meta(4 * width, width)).handoff(x)
    normalise(x, meta(width), meta(width), 1e-6, HALF, handoff=handoff)


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=HALF, device="meta")
