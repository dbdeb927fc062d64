"""A linear layer in FP8, quantisation included: fc1 of a block, forward and both gradients."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit_kernels
from benchmarks import fp8_peers
from benchmarks.peers import compiled, need_cuda
from benchmarks.registry import Binder, Bound, Case, Draw, Inputs, Op, Provider, Unusable, Work, functional, leaves_of
from fastvit_kernels import Fp8
from fastvit_kernels.fp8.setting import Scaling, obstacle

# Relative rounding of the coarsest operand: e5m2 has two bits of mantissa, e4m3 three.
E5M2, E4M3 = 2.0**-2, 2.0**-3


def inputs(case: Case, draw: Draw) -> dict[str, Tensor]:
    width, hidden = case.shape.width, case.shape.mlp_dim
    return {
        "x": draw.normal(case.batch, case.shape.tokens, width),
        "weight": draw.normal(hidden, width, scale=width**-0.5),
        "bias": draw.normal(hidden, scale=0.02),
    }


def work(case: Case) -> dict[str, Work]:
    """Operands are in 16 bits at first, so that is what must be read."""
    width, hidden, size = case.shape.width, case.shape.mlp_dim, case.dtype.itemsize
    products = 2 * case.rows * width * hidden
    least = size * (case.rows * (width + hidden) + width * hidden)
    return {"forward": Work(products, least), "backward": Work(2 * products, 2 * least)}


def need_products(case: Case) -> None:
    """Unusable unless the GPU has FP8 products, and the case is in the dtype that they give."""
    need_cuda(case, half=True)
    if case.dtype != torch.bfloat16:
        raise Unusable("takes bf16 only")
    if (reason := obstacle(case.device)) is not None:
        raise Unusable(reason)


def ours(scaling: Scaling) -> Callable[[Case], Callable[..., Tensor]]:
    def make(case: Case) -> Callable[..., Tensor]:
        if case.device.type == "cuda":
            need_products(case)
        fp8 = Fp8(scaling)
        return lambda **given: fastvit_kernels.fp8_linear(**given, fp8=fp8, layer="fc1")

    return make


def torchao(recipe: str) -> Callable[[Case], Binder]:
    """Compiled, which is how torchao is meant to be used; emulated on a CPU, as ours."""

    def make(case: Case) -> Binder:
        if case.device.type == "cuda":
            need_products(case)
        return bound_layer(
            case,
            lambda: nn.Sequential(nn.Linear(case.shape.width, case.shape.mlp_dim)),
            "0.",
            lambda module: compiled(fp8_peers.torchao_layers(module, recipe, rows=case.rows)),
        )

    return make


def transformer_engine(case: Case) -> Binder:
    """With current scaling, as here."""
    need_products(case)
    engine, in_fp8 = fp8_peers.transformer_engine(case.rows)

    def finish(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with in_fp8():
                result: Tensor = module(x)
            return result

        return run

    return bound_layer(
        case, lambda: engine.Linear(case.shape.width, case.shape.mlp_dim, params_dtype=case.dtype), "", finish
    )


def bound_layer(
    case: Case, make: Callable[[], nn.Module], prefix: str, finish: Callable[[nn.Module], Callable[[Tensor], Any]]
) -> Binder:
    """A layer of a library with the inputs as parameters, whose names begin with `prefix`; `finish` makes it run."""

    def bind(given: Inputs) -> Bound:
        module = make().to(case.device, case.dtype)
        named: Mapping[str, Tensor] = {name: module.get_parameter(prefix + name) for name in ("weight", "bias")}
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(given[name])
        run = finish(module)
        x = leaves_of(case.op, given)["x"]
        return Bound(lambda: (run(x),), {"x": x, **named})

    return bind


FP8_LINEAR = Op(
    "fp8_linear",
    "Linear layer (fc1), operands quantised to FP8",
    inputs,
    lambda case: F.linear,
    work,
    providers=(
        Provider("fastvit", functional(ours("tensor")), precision=E5M2),
        Provider("fastvit row", functional(ours("row")), precision=E4M3),
        Provider("bf16 linear", functional(lambda case: F.linear)),
        Provider("torchao tensorwise", torchao("tensorwise"), "torchao", slow=True, precision=E5M2),
        Provider("torchao rowwise", torchao("rowwise"), "torchao", slow=True, precision=E4M3),
        Provider("transformer_engine", transformer_engine, "transformer-engine", precision=E5M2),
    ),
    dtype=torch.bfloat16,
)
