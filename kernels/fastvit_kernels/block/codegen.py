"""The cases of the block for `tuning.codegen`: ViT-B/16, L/16 and H/14, both passes, on 64 images."""

from collections.abc import Iterator
from functools import partial

import torch

from fastvit_kernels.block.op import Call, launch_backward, launch_forward
from fastvit_kernels.tuning.codegen import Case

HALF, FULL = torch.bfloat16, torch.float32
ATTENTION = ("attention_fwd_kernel", "attention_bwd_query_kernel", "attention_bwd_key_kernel")


def cases() -> Iterator[Case]:
    for model, tokens, width, heads in (("B/16", 197, 768, 12), ("L/16", 197, 1024, 16), ("H/14", 257, 1280, 16)):
        yield Case(f"ViT-{model}", partial(block, tokens, width, heads), ATTENTION)
    yield Case("ViT-H/14, LayerScale and drop-path", partial(block, 257, 1280, 16, scaled=True), ATTENTION)
    yield Case("ViT-H/14, autocast", partial(block, 257, 1280, 16, stream=FULL), ATTENTION)


def block(tokens: int, width: int, heads: int, *, scaled: bool = False, stream: torch.dtype = HALF) -> None:
    def norm() -> tuple[torch.Tensor, torch.Tensor]:
        return meta(width, dtype=stream), meta(width, dtype=stream)

    def layer(out: int, of: int) -> tuple[torch.Tensor, torch.Tensor]:
        return meta(out, of), meta(out)

    x = meta(64, tokens, width, dtype=stream)
    layer_scale, path_scale = (meta(width, dtype=stream), meta(64, dtype=FULL)) if scaled else (None, None)
    attention = *norm(), *layer(3 * width, width), *layer(width, width), layer_scale
    mlp = *norm(), *layer(4 * width, width), *layer(width, 4 * width), layer_scale
    options = heads, 1e-6, False, False
    call = Call(x, *attention, *mlp, path_scale, path_scale, *options, True, True, True, True, True, False)
    y, *kept = launch_forward(*call)
    learned = [tensor is not None for tensor in call[:15]]
    launch_backward(y, learned, *kept, *call)


def meta(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
