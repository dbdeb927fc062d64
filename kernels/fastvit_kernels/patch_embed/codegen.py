"""The cases of patch embedding for `tuning.codegen`: ViT-B/16, L/16 and H/14 at 224 pixels, 64 images."""

from collections.abc import Iterator
from functools import partial

import torch

from fastvit_kernels.patch_embed.op import launch_backward, launch_forward
from fastvit_kernels.tuning.codegen import Case

HALF, FULL, BYTES = torch.bfloat16, torch.float32, torch.uint8
MODELS = {"B/16": (16, 768), "L/16": (16, 1024), "H/14": (14, 1280)}
KERNELS = ("patch_embed_fwd_kernel", "patch_embed_bwd_kernel")


def cases() -> Iterator[Case]:
    for model, (patch, width) in MODELS.items():
        for layout, images in {"uint8 HWC": BYTES, "bfloat16 CHW": HALF, "float32 CHW": FULL}.items():
            yield Case(f"{model}, {layout}", partial(embed, patch, width, images), KERNELS)
    yield Case("H/14, uint8 HWC, registers, 64 of 256", partial(embed, 14, 1280, BYTES, registers=4, kept=64), KERNELS)
    yield Case("B/16, uint8 HWC, float32", partial(embed, 16, 768, BYTES, dtype=FULL))


def embed(
    patch: int,
    width: int,
    image_dtype: torch.dtype,
    dtype: torch.dtype = HALF,
    registers: int = 0,
    kept: int | None = None,
) -> None:
    images = meta(64, 3, 224, 224, dtype=image_dtype)
    if image_dtype == BYTES:
        images = meta(64, 224, 224, 3, dtype=BYTES).permute(0, 3, 1, 2)
    weight, cls_token = meta(width, 3, patch, patch, dtype=dtype), meta(1, 1, width, dtype=dtype)
    pos_embed = meta(1, 1 + (224 // patch) ** 2, width, dtype=dtype)
    register_tokens = meta(1, registers, width, dtype=dtype) if registers else None
    keep_indices = meta(64, kept, dtype=torch.int64) if kept else None
    scale = [0.5, 0.5, 0.5]
    tokens = launch_forward(
        images, weight, cls_token[0, 0], pos_embed, cls_token, register_tokens, keep_indices, scale, scale
    )
    launch_backward(tokens, images, weight, keep_indices, True, registers, scale, scale, True, dtype)


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
