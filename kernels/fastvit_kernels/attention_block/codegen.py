"""The cases of the attention half-block for `tuning.codegen`: ViT-B/16, L/16 and H/14, both passes, on 64 images."""

from collections.abc import Iterator
from functools import partial

import torch

from fastvit_kernels.attention_block.op import Call, launch_backward, launch_forward
from fastvit_kernels.gemm.config import PRODUCTS, Product, triton_for
from fastvit_kernels.tuning.codegen import Case

HALF, FULL = torch.bfloat16, torch.float32
ATTENTION = ("attention_fwd_kernel", "attention_bwd_query_kernel", "attention_bwd_key_kernel")


def cases() -> Iterator[Case]:
    for model, tokens, width, heads in (("B/16", 197, 768, 12), ("L/16", 197, 1024, 16), ("H/14", 257, 1280, 16)):
        block = partial(half_block, tokens, width, heads)
        yield Case(f"ViT-{model}", block, ATTENTION)
        yield Case(f"ViT-{model}, products in Triton", partial(block, products=PRODUCTS), ("gemm_kernel", *ATTENTION))
    yield Case("ViT-H/14, LayerScale and drop-path", partial(block, scaled=True), ATTENTION)
    yield Case("ViT-H/14, autocast", partial(block, stream=FULL), ATTENTION)


def half_block(
    tokens: int,
    width: int,
    heads: int,
    *,
    products: tuple[Product, ...] = (),
    scaled: bool = False,
    stream: torch.dtype = HALF,
) -> None:
    x, norm = meta(64, tokens, width, dtype=stream), meta(width, dtype=stream)
    qkv_weight, qkv_bias = meta(3 * width, width), meta(3 * width)
    proj = meta(width, width), meta(width)
    layer_scale, path_scale = (meta(width, dtype=stream), meta(64, dtype=FULL)) if scaled else (None, None)
    parameters = norm, norm, qkv_weight, qkv_bias, *proj, layer_scale
    call = Call(x, *parameters, path_scale, heads, 1e-6, causal=False, keep=True, keep_normed=True)
    with triton_for(*products):
        y, *kept = launch_forward(*call)
        launch_backward(y, [True] * 7 + [scaled], *kept, *call)


def meta(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
