"""The launch parameters of layer normalisation that `fastvit_kernels.tuning` tries."""

from collections.abc import Iterator
from functools import partial

import torch

from fastvit_kernels.dispatch import Gpu
from fastvit_kernels.layer_norm import op
from fastvit_kernels.layer_norm.op import BackwardTile, ForwardTile, whole_rows
from fastvit_kernels.tuning.search import HALF, Case, Model


def cases(model: Model, on: Gpu) -> Iterator[Case]:
    rows, width = model.batch * model.tokens, model.width
    # fmt: off
    for name, branch in (("layer_norm", False), ("add_layer_norm", True)):
        yield Case(f"{model.name} {name}", op.forward_tile, (width, HALF, branch, rows), forward_candidates(width),
                   partial(forward_inputs, rows, width, branch), op.launch_forward, ("layer_norm_fwd_kernel",))
    yield Case(f"{model.name} layer_norm gradient", op.backward_tile, (width, HALF, False, rows),
               backward_candidates(width), partial(backward_inputs, rows, width), op.launch_backward,
               ("layer_norm_bwd_kernel",))
    # fmt: on


def forward_candidates(width: int) -> list[ForwardTile]:
    """From one row a warp to few numbers a thread, where bytes in flight are traded for registers."""
    return [
        ForwardTile(*whole_rows(width, warps, elements))
        for warps, elements in ((1, 64), (2, 32), (4, 8), (4, 16), (4, 32), (8, 8), (8, 16))
    ]


def backward_candidates(width: int) -> list[BackwardTile]:
    """Programs, warps and stages times the rows of each: all are ways to have enough loads under way."""
    tile = whole_rows(width, 8, 16)
    return [
        BackwardTile(*tile, stages=1, programs=2),
        BackwardTile(*tile, stages=3, programs=2),
        BackwardTile(*tile, stages=2, programs=1),
        BackwardTile(*tile, stages=2, programs=4),
        BackwardTile(*whole_rows(width, 8, 8), stages=2, programs=2),
        BackwardTile(*whole_rows(width, 8, 8), stages=3, programs=3),
        BackwardTile(*whole_rows(width, 4, 16), stages=2, programs=4),
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
