"""The launch parameters of layer normalisation that `fastvit_kernels.tuning` tries."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastvit_kernels.dispatch import Gpu
from fastvit_kernels.layer_norm import op
from fastvit_kernels.layer_norm.op import BackwardTile, ForwardTile, whole_rows
from fastvit_kernels.table import Runs
from fastvit_kernels.tuning.search import HALF, Case, Model


def cases(model: Model, on: Gpu) -> Iterator[Case]:
    rows, width = model.batch * model.tokens, model.width
    # fmt: off
    for name, branch in (("layer_norm", False), ("add_layer_norm", True)):
        yield Case(f"{model.name} {name}", op.forward_tile, (width, HALF, branch, rows), forward_candidates(width),
                   partial(forward_inputs, rows, width, branch), op.launch_forward, ("layer_norm_fwd_kernel",))
    yield Case(f"{model.name} layer_norm gradient", op.backward_tile, (width, HALF, 2, rows),
               backward_candidates(width), partial(backward_inputs, rows, width), op.launch_backward,
               ("layer_norm_bwd_kernel",))
    yield Case(f"{model.name} layer_norm, who runs it", op.runs, (width, HALF, False, rows), [Runs("reference")],
               partial(step_inputs, rows, width), step, ())
    # fmt: on


def forward_candidates(width: int) -> list[ForwardTile]:
    """From one row per warp to few numbers per thread, where bytes in flight are traded for registers."""
    rows, columns, num_warps = whole_rows(width, most=64)
    tiles = [whole_rows(width, most) for most in (64, 32, 16)]
    tiles += [(2 * rows, columns, num_warps), (2 * rows, columns, 2 * num_warps), (1, columns, max(1, num_warps // 4))]
    return [ForwardTile(*tile) for tile in dict.fromkeys(tiles)]


def backward_candidates(width: int) -> list[BackwardTile]:
    """Programs, warps and stages times the rows of each: all are ways to have enough loads under way."""
    tile, half = whole_rows(width, 52), whole_rows(width, 26)
    return [
        BackwardTile(*tile, stages=1, programs=2),
        BackwardTile(*tile, stages=2, programs=2),
        BackwardTile(*tile, stages=3, programs=2),
        BackwardTile(*tile, stages=2, programs=1),
        BackwardTile(*tile, stages=2, programs=4),
        BackwardTile(*half, stages=2, programs=2),
        BackwardTile(*half, stages=2, programs=4),
        BackwardTile(*half, stages=3, programs=3),
    ]


def forward_inputs(rows: int, width: int, branch: bool, device: torch.device) -> tuple:
    x, added = (torch.randn(rows, width, dtype=HALF, device=device) for _ in range(2))
    weight, bias = (torch.randn(width, dtype=HALF, device=device) for _ in range(2))
    return x, added if branch else None, None, None, weight, bias, 1e-6


def backward_inputs(rows: int, width: int, device: torch.device) -> tuple:
    x, grad_y, grad_normed = (torch.randn(rows, width, dtype=HALF, device=device) for _ in range(3))
    weight, bias = (torch.randn(width, dtype=HALF, device=device) for _ in range(2))
    _, _, mean, rstd = op.launch_forward(x, None, None, None, weight, bias, 1e-6)
    return grad_y, grad_normed, x, None, HALF, None, None, weight, bias, mean, rstd


def step_inputs(rows: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    x, grad = (torch.randn(rows, width, dtype=HALF, device=device) for _ in range(2))
    weight, bias = (torch.randn(width, dtype=HALF, device=device) for _ in range(2))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), grad


def step(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward pass."""
    y = op.layer_norm(x, weight, bias)
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad)
