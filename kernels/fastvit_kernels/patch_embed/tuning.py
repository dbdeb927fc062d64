"""The launch parameters of patch embedding that `fastvit_kernels.tuning` tries."""

from collections.abc import Iterator
from functools import partial

import torch

from fastvit_kernels.dispatch import Gpu
from fastvit_kernels.patch_embed import op
from fastvit_kernels.patch_embed.op import Tile
from fastvit_kernels.tuning.search import HALF, Case, Model

SCALE = [0.5, 0.5, 0.5]


def cases(model: Model, on: Gpu) -> Iterator[Case]:
    key = (model.patch, torch.uint8, HALF, model.width, model.batch * (model.tokens - 1))
    # fmt: off
    yield Case(f"{model.name} patch_embed", op.forward_tile, key, forward_candidates(on),
               partial(forward_inputs, model), op.launch_forward, ("patch_embed_fwd_kernel",))
    yield Case(f"{model.name} patch_embed, weight gradient", op.backward_tile, key, backward_candidates(on),
               partial(backward_inputs, model), op.launch_backward, ("patch_embed_bwd_kernel",))
    # fmt: on


def forward_candidates(on: Gpu) -> list[Tile]:
    stages = op.stages(on)
    return [
        Tile(128, 128, 64, num_warps=8, stages=2),
        Tile(128, 128, 64, num_warps=4, stages=stages),
        Tile(128, 128, 32, num_warps=8, stages=stages),
        Tile(64, 128, 64, num_warps=4, stages=stages),
        Tile(128, 64, 64, num_warps=4, stages=stages),
        Tile(128, 256, 64, num_warps=8, stages=stages),  # pixels are gathered again for each range of columns
    ]


def backward_candidates(on: Gpu) -> list[Tile]:
    stages = op.stages(on)
    return [
        Tile(64, 128, 128, num_warps=8, stages=2),
        Tile(64, 128, 128, num_warps=4, stages=stages),
        Tile(32, 128, 128, num_warps=8, stages=stages),
        Tile(64, 128, 64, num_warps=4, stages=stages),
        Tile(64, 256, 64, num_warps=8, stages=stages),
    ]


def forward_inputs(model: Model, device: torch.device) -> tuple:
    images = torch.randint(256, (model.batch, model.image, model.image, 3), dtype=torch.uint8, device=device)
    weight = 0.02 * torch.randn(model.width, 3, model.patch, model.patch, dtype=HALF, device=device)
    bias = torch.randn(model.width, dtype=HALF, device=device)
    pos_embed = torch.randn(1, model.tokens, model.width, dtype=HALF, device=device)
    cls_token = torch.randn(1, 1, model.width, dtype=HALF, device=device)
    return images.permute(0, 3, 1, 2), weight, bias, pos_embed, cls_token, None, None, SCALE, SCALE


def backward_inputs(model: Model, device: torch.device) -> tuple:
    images, weight, *_ = forward_inputs(model, device)
    grad = torch.randn(model.batch, model.tokens, model.width, dtype=HALF, device=device)
    return grad, images, weight, None, True, 0, SCALE, SCALE, True
