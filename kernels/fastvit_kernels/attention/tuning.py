"""The launch parameters of attention that `fastvit_kernels.tuning` tries."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastvit_kernels.attention import launch, tiling
from fastvit_kernels.attention.providers import PROVIDERS, backward_runs, forward_runs
from fastvit_kernels.attention.tiling import Tiling
from fastvit_kernels.dispatch import Gpu
from fastvit_kernels.table import Runs
from fastvit_kernels.tuning.search import HALF, Case, Model


def cases(model: Model, on: Gpu) -> Iterator[Case]:
    key = (model.width // model.heads, HALF, model.tokens)
    # fmt: off
    yield Case(f"{model.name} attention", tiling.forward_tiling, key, forward_candidates(on),
               partial(forward_inputs, model), launch.launch_forward, ("attention_fwd_kernel",))
    yield Case(f"{model.name} attention, query gradient", tiling.backward_query_tiling, key, backward_candidates(on),
               partial(backward_inputs, model), launch.launch_backward, ("attention_bwd_query_kernel",))
    yield Case(f"{model.name} attention, key and value gradients", tiling.backward_key_tiling, key,
               key_candidates(model, on), partial(backward_inputs, model), launch.launch_backward,
               ("attention_bwd_key_kernel",))
    # fmt: on
    yield from library_cases(model, key, on)


def library_cases(model: Model, key: tuple, on: Gpu) -> Iterator[Case]:
    """A library's gradients are chosen only if they have the same bits in all runs."""
    libraries = [Runs(name) for name in PROVIDERS] if on.arch.startswith("sm_") else []
    # fmt: off
    yield Case(f"{model.name} attention, who runs it", forward_runs, key, libraries, partial(forward_inputs, model),
               launch.launch_forward, ())
    yield Case(f"{model.name} attention, who runs its gradient", backward_runs, key, libraries,
               partial(backward_inputs, model), launch.launch_backward, ())
    # fmt: on


def forward_candidates(on: Gpu) -> list[Tiling]:
    if on.arch.startswith("gfx"):  # 64 KiB of shared memory: little room for stages
        return [Tiling(rows, columns, 4, 1) for rows in (64, 128) for columns in (32, 64)] + [Tiling(128, 64, 8, 1)]
    return [
        Tiling(128, 64, num_warps=8, stages=2),  # with and without room for a second program beside it
        Tiling(128, 64, num_warps=8, stages=2, max_registers=128),
        Tiling(128, 64, num_warps=8, stages=3),
        Tiling(128, 128, num_warps=8, stages=2),  # fewer steps, in each of which the maximum is found anew
        Tiling(64, 64, num_warps=4, stages=2),  # small programs: more of them hide each other's waiting
        Tiling(64, 64, num_warps=4, stages=3),
        Tiling(64, 32, num_warps=4, stages=3),
    ]


def backward_candidates(on: Gpu) -> list[Tiling]:
    if on.arch.startswith("gfx"):
        return [Tiling(rows, columns, 4, 1) for rows in (64, 128) for columns in (32, 64)]
    return [
        Tiling(128, 32, num_warps=8, stages=2),
        Tiling(128, 32, num_warps=8, stages=2, max_registers=128),
        Tiling(128, 32, num_warps=8, stages=3),
        Tiling(128, 32, num_warps=8, stages=3, max_registers=128),
        Tiling(128, 64, num_warps=8, stages=2),
        Tiling(64, 64, num_warps=4, stages=2),
        Tiling(64, 32, num_warps=4, stages=2),
        Tiling(64, 32, num_warps=4, stages=3),
    ]


def key_candidates(model: Model, on: Gpu) -> list[Tiling]:
    """Two sums instead of one: with 128 registers they spill above 64 a head, or up to there if blocks are wide."""
    candidates = [candidate for candidate in backward_candidates(on) if candidate.max_registers is None]
    if model.width // model.heads > 64 or on.arch.startswith("gfx"):
        return candidates
    return [*candidates, Tiling(128, 16, num_warps=8, stages=3, max_registers=128)]


def forward_inputs(model: Model, device: torch.device) -> tuple[Tensor, ...]:
    shape = (model.batch, model.tokens, 3, model.heads, model.width // model.heads)
    return (torch.randn(shape, dtype=HALF, device=device),)


def backward_inputs(model: Model, device: torch.device) -> tuple[Tensor, ...]:
    (qkv,) = forward_inputs(model, device)
    out, lse = launch.launch_forward(qkv)
    return torch.randn(out.shape, dtype=HALF, device=device), qkv, out, lse
