"""The launch parameters of patch embedding that `fastvit_kernels.tuning` tries."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastvit_kernels.dispatch import Gpu
from fastvit_kernels.patch_embed import op
from fastvit_kernels.patch_embed.op import Tile
from fastvit_kernels.table import Runs
from fastvit_kernels.tuning.search import HALF, Case, Model

SCALE = [0.5, 0.5, 0.5]


def cases(model: Model, on: Gpu) -> Iterator[Case]:
    key = (model.patch, torch.uint8, HALF, model.width, model.batch * (model.tokens - 1))
    # fmt: off
    yield Case(f"{model.name} patch_embed", op.forward_tile, key, forward_candidates(on),
               partial(forward_inputs, model), op.launch_forward, ("patch_embed_fwd_kernel",))
    yield Case(f"{model.name} patch_embed, weight gradient", op.backward_tile, key, backward_candidates(on),
               partial(backward_inputs, model), op.launch_backward, ("patch_embed_bwd_kernel",))
    yield Case(f"{model.name} patch_embed, who runs it", op.runs, key, [Runs("reference")],
               partial(step_inputs, model), step, ())
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
    return grad, images, weight, None, True, 0, SCALE, SCALE, True, HALF


def step_inputs(model: Model, device: torch.device) -> tuple[Tensor, ...]:
    images, *learned = forward_inputs(model, device)[:5]
    grad = torch.randn(model.batch, model.tokens, model.width, dtype=HALF, device=device)
    return images, *(tensor.requires_grad_() for tensor in learned), grad


def step(images: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward pass."""
    *learned, grad = others
    weight, bias, pos_embed, cls_token = learned
    tokens = op.patch_embed(images, weight, bias, pos_embed=pos_embed, cls_token=cls_token, mean=SCALE, std=SCALE)
    return tokens.detach(), *torch.autograd.grad(tokens, learned, grad)
