"""The cases of the MLP half-block for `tuning.codegen`: ViT-B/16, L/16 and H/14, both passes, on 64 images."""

from collections.abc import Iterator
from functools import partial

import torch

from fastvit_kernels.gemm.config import PRODUCTS, Product, triton_for
from fastvit_kernels.mlp.op import Call, launch_backward, launch_forward
from fastvit_kernels.tuning.codegen import Case

HALF, FULL = torch.bfloat16, torch.float32


def cases() -> Iterator[Case]:
    for model, tokens, width in (("B/16", 197, 768), ("L/16", 197, 1024), ("H/14", 257, 1280)):
        yield Case(f"ViT-{model}", partial(half_block, tokens, width))
        in_triton = partial(half_block, tokens, width, products=PRODUCTS)
        yield Case(f"ViT-{model}, products in Triton", in_triton, ("gemm_kernel",))
    yield Case("ViT-H/14, tanh GELU", partial(half_block, 257, 1280, tanh=True))
    yield Case("ViT-H/14, LayerScale and drop-path", partial(half_block, 257, 1280, scaled=True))
    yield Case("ViT-H/14, autocast", partial(half_block, 257, 1280, stream=FULL))
    yield Case("ViT-H/14, float32", partial(half_block, 257, 1280, stream=FULL, dtype=FULL))


def half_block(
    tokens: int,
    width: int,
    *,
    products: tuple[Product, ...] = (),
    tanh: bool = False,
    scaled: bool = False,
    stream: torch.dtype = HALF,
    dtype: torch.dtype = HALF,
) -> None:
    hidden = 4 * width
    x, norm = meta(64, tokens, width, dtype=stream), meta(width, dtype=stream)
    fc1_weight, fc1_bias = meta(hidden, width, dtype=dtype), meta(hidden, dtype=dtype)
    fc2_weight, fc2_bias = meta(width, hidden, dtype=dtype), meta(width, dtype=dtype)
    layer_scale, path_scale = (meta(width, dtype=stream), meta(64, dtype=FULL)) if scaled else (None, None)
    parameters = norm, norm, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale
    call = Call(x, *parameters, path_scale, 1e-6, tanh, keep_normed=True, keep_pre=True, keep_post=False)
    with triton_for(*products):
        y, *kept = launch_forward(*call)
        launch_backward(y, [True] * 7 + [scaled], *kept, *call)


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
