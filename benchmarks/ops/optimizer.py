"""A step of AdamW on the parameters of four blocks. The engine has no kernel of its own for it: it uses PyTorch's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.apex_detection import need_apex
from benchmarks.peers import need, need_cuda
from benchmarks.registry import Binder, Bound, Case, Draw, Inputs, Op, Provider, Work

BLOCKS = 4
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 3  # until the parameters are judged: after one step AdamW has only told signs


def sizes(case: Case) -> list[tuple[int, ...]]:
    width, hidden = case.shape.width, case.shape.mlp_dim
    vectors = [(width,)] * 4 + [(3 * width,), (width,), (hidden,), (width,)]
    return BLOCKS * [(3 * width, width), (width, width), (hidden, width), (width, hidden), *vectors]


def inputs(case: Case, draw: Draw) -> dict[str, Tensor]:
    """Parameters, and the gradients of two steps, which take turns."""
    drawn = {}
    for index, size in enumerate(sizes(case)):
        drawn[f"parameter{index}"] = draw.normal(*size, scale=0.02)
        drawn[f"first{index}"] = draw.normal(*size, scale=1e-3)
        drawn[f"second{index}"] = draw.normal(*size, scale=1e-2)
    return drawn


def work(case: Case) -> dict[str, Work]:
    numbers = sum(torch.Size(size).numel() for size in sizes(case))
    return {"forward": Work(0, 7 * numbers * case.dtype.itemsize)}  # reads p, g, m, v; writes p, m, v


def plain(case: Case) -> Callable[..., tuple[Tensor, ...]]:
    """The first steps of Loshchilov and Hutter 2019, algorithm 2, written out."""

    def steps(**given: Tensor) -> tuple[Tensor, ...]:
        (beta1, beta2), rate, results = SETTINGS["betas"], SETTINGS["lr"], []
        for index in range(len(sizes(case))):
            parameter = given[f"parameter{index}"].clone()
            mean, square = torch.zeros_like(parameter), torch.zeros_like(parameter)
            for step in range(1, STEPS + 1):
                grad = given[f"{'first' if step % 2 else 'second'}{index}"]
                mean = beta1 * mean + (1 - beta1) * grad
                square = beta2 * square + (1 - beta2) * grad.square()
                direction = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + SETTINGS["eps"])
                parameter = parameter * (1 - rate * SETTINGS["weight_decay"]) - rate * direction
            results.append(parameter)
        return tuple(results)

    return steps


def stepping(build: Callable[[Case], Callable[[list[Tensor]], Any]]) -> Callable[[Case], Binder]:
    """`build(case)` takes the parameters and gives an optimizer."""

    def make(case: Case) -> Binder:
        optimizer_of = build(case)

        def bind(given: Inputs) -> Bound:
            count = len(sizes(case))
            parameters = [given[f"parameter{index}"].detach().clone().requires_grad_() for index in range(count)]
            turns = [[given[f"{name}{index}"] for index in range(count)] for name in ("first", "second")]
            optimizer, calls = optimizer_of(parameters), [0]

            def next_gradients() -> None:
                for parameter, grad in zip(parameters, turns[calls[0] % 2], strict=True):
                    parameter.grad = grad
                calls[0] += 1

            def forward() -> tuple[Tensor, ...]:
                optimizer.step()
                return tuple(parameters)

            return Bound(forward, {}, next_gradients)

        return bind

    return make


def torch_adamw(**options: Any) -> Callable[[Case], Callable[[list[Tensor]], Any]]:
    return lambda case: lambda parameters: torch.optim.AdamW(parameters, **SETTINGS, **options)


def apex(case: Case) -> Callable[[list[Tensor]], Any]:
    need_cuda(case)
    adam = need_apex("apex.optimizers.fused_adam").FusedAdam
    return lambda parameters: adam(parameters, **SETTINGS, adam_w_mode=True)


def deepspeed(case: Case) -> Callable[[list[Tensor]], Any]:
    need_cuda(case)
    adam = need("deepspeed.ops.adam").FusedAdam  # compiled by the first use of it
    return lambda parameters: adam(parameters, **SETTINGS, adam_w_mode=True)


ADAMW = Op(
    "adamw",
    "a step of AdamW on four blocks",
    inputs,
    plain,
    work,
    providers=(
        Provider("torch fused", stepping(torch_adamw(fused=True))),
        Provider("torch foreach", stepping(torch_adamw(foreach=True))),
        Provider("torch for-loop", stepping(torch_adamw(foreach=False))),
        Provider("deepspeed", stepping(deepspeed), "deepspeed", slow=True),
        Provider("apex", stepping(apex), "apex"),
    ),
    passes=("forward",),
    checked_call=STEPS,
    dtype=torch.float32,
)
