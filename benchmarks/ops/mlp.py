"""The MLP half of a block: normalisation, two dense layers around a GELU, residual."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit_kernels
from benchmarks.apex_detection import need_apex
from benchmarks.fp8_peers import torchao_layers
from benchmarks.ops.layer_norm import EPS, torch_norm
from benchmarks.ops.layer_norm import plain as plain_norm
from benchmarks.peers import MAX_AUTOTUNE, compiled, need, need_cuda, need_vision
from benchmarks.registry import Binder, Bound, Case, Draw, Inputs, Op, Provider, Unusable, Work, functional, leaves_of

FP8 = 2.0**-3  # relative rounding of e4m3, which has three bits of mantissa


def inputs(case: Case, draw: Draw) -> dict[str, Tensor]:
    width, hidden = case.shape.width, case.shape.mlp_dim
    return {
        "x": draw.normal(case.batch, case.shape.tokens, width),
        "norm_weight": draw.normal(width, scale=0.1, mean=1.0),
        "norm_bias": draw.normal(width, scale=0.1),
        "fc1_weight": draw.normal(hidden, width, scale=width**-0.5),
        "fc1_bias": draw.normal(hidden, scale=0.02),
        "fc2_weight": draw.normal(width, hidden, scale=hidden**-0.5),
        "fc2_bias": draw.normal(width, scale=0.02),
    }


def work(case: Case) -> dict[str, Work]:
    width, hidden, size = case.shape.width, case.shape.mlp_dim, case.dtype.itemsize
    products = 4 * case.rows * width * hidden
    stream, middle, weights = case.rows * width, case.rows * hidden, 2 * width * hidden
    return {
        "forward": Work(products, size * (2 * stream + middle + weights)),  # what GELU takes is kept for backward
        "backward": Work(2 * products, size * (3 * stream + middle + 2 * weights)),
    }


def half_block(norm: Callable[..., Tensor], approximate: str) -> Callable[..., Tensor]:
    def run(
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
    ) -> Tensor:
        hidden = F.gelu(F.linear(norm(x, norm_weight, norm_bias), fc1_weight, fc1_bias), approximate=approximate)
        return x + F.linear(hidden, fc2_weight, fc2_bias)

    return run


def ours(activation: Literal["gelu", "gelu_tanh"]) -> Callable[[Case], Callable[..., Tensor]]:
    return lambda case: lambda **given: fastvit_kernels.layer_norm_mlp(**given, eps=EPS, activation=activation)


def timm(case: Case) -> Callable[..., Tensor]:
    layers = need_vision("timm.layers")
    norm = layers.LayerNorm(case.shape.width, eps=EPS).to(case.device, case.dtype)
    mlp = layers.Mlp(case.shape.width, case.shape.mlp_dim).to(case.device, case.dtype)
    call = torch.func.functional_call

    def run(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, **given: Tensor) -> Tensor:
        weights = {name.replace("_", "."): tensor for name, tensor in given.items()}
        return x + call(mlp, weights, (call(norm, {"weight": norm_weight, "bias": norm_bias}, (x,)),))

    return run


def apex(case: Case) -> Binder:
    """Both dense layers and the tanh GELU of cuBLASLt's epilogue in one call; two-dimensional inputs only."""
    need_cuda(case, half=True)
    fused_dense = need_apex("apex.fused_dense.fused_dense")

    def make() -> nn.Module:
        return fused_dense.FusedDenseGeluDense(case.shape.width, case.shape.mlp_dim, case.shape.width)

    names = {"fc1_weight": "weight1", "fc1_bias": "bias1", "fc2_weight": "weight2", "fc2_bias": "bias2"}

    def bind(given: Inputs) -> Bound:
        module = loaded(case, make(), names, given)
        leaves = {name: leaf for name, leaf in leaves_of(case.op, given).items() if name not in names}
        x = leaves["x"]

        def forward() -> tuple[Tensor]:
            normed = torch_norm(x, leaves["norm_weight"], leaves["norm_bias"])
            return (x + module(normed.flatten(0, 1)).view(x.shape),)

        return Bound(forward, leaves | parameters(module, names))

    return bind


def transformer_engine(case: Case) -> Binder:
    need_cuda(case, half=True)
    engine = need("transformer_engine.pytorch")
    names = {
        "norm_weight": "layer_norm_weight",
        "norm_bias": "layer_norm_bias",
        "fc1_weight": "fc1_weight",
        "fc1_bias": "fc1_bias",
        "fc2_weight": "fc2_weight",
        "fc2_bias": "fc2_bias",
    }

    def bind(given: Inputs) -> Bound:
        made = engine.LayerNormMLP(
            case.shape.width, case.shape.mlp_dim, eps=EPS, activation="gelu", params_dtype=case.dtype
        )
        module = loaded(case, made, names, given)
        x = leaves_of(case.op, given)["x"]
        return Bound(lambda: (x + module(x),), {"x": x} | parameters(module, names))

    return bind


def torchao(case: Case) -> Binder:
    """Both dense layers in float8 with a scale a tensor, compiled, which is how torchao is meant to be used."""
    need_cuda(case, half=True)
    if torch.cuda.get_device_capability(case.device) < (8, 9):
        raise Unusable("this GPU has no float8 matrix products")
    names = {"fc1_weight": "0.weight", "fc1_bias": "0.bias", "fc2_weight": "2.weight", "fc2_bias": "2.bias"}

    def bind(given: Inputs) -> Bound:
        dense = nn.Linear(case.shape.width, case.shape.mlp_dim), nn.Linear(case.shape.mlp_dim, case.shape.width)
        module = loaded(case, nn.Sequential(dense[0], nn.GELU(), dense[1]), names, given)
        module = torchao_layers(module, "tensorwise", rows=case.rows)
        leaves = {name: leaf for name, leaf in leaves_of(case.op, given).items() if name not in names}

        def run(x: Tensor) -> Tensor:
            return x + module(torch_norm(x, leaves["norm_weight"], leaves["norm_bias"]))

        fast = compiled(run)
        return Bound(lambda: (fast(leaves["x"]),), leaves | parameters(module, names))

    return bind


def loaded(case: Case, module: nn.Module, names: Mapping[str, str], given: Inputs) -> nn.Module:
    """A module with the inputs in its parameters; `names` says which is which."""
    module = module.to(case.device, case.dtype)
    with torch.no_grad():
        for name, parameter in parameters(module, names).items():
            parameter.copy_(given[name])
    return module


def parameters(module: nn.Module, names: Mapping[str, str]) -> dict[str, Any]:
    return {name: module.get_parameter(parameter) for name, parameter in names.items()}


def plain(approximate: str) -> Callable[[Case], Callable[..., Tensor]]:
    return lambda case: half_block(plain_norm(case), approximate)


def common(activation: Literal["gelu", "gelu_tanh"], approximate: str) -> tuple[Provider, ...]:
    eager = half_block(torch_norm, approximate)
    return (
        Provider("fastvit", functional(ours(activation))),
        Provider("eager", functional(lambda case: eager)),
        Provider("compile", functional(lambda case: compiled(eager)), slow=True),
        Provider("compile max-autotune", functional(lambda case: compiled(eager, MAX_AUTOTUNE)), slow=True),
    )


MLP = Op(
    "layer_norm_mlp",
    "MLP half of a block, erf GELU",
    inputs,
    plain("none"),
    work,
    providers=(
        *common("gelu", "none"),
        Provider("timm", functional(timm), "timm"),
        Provider("torchao fp8", torchao, "torchao", slow=True, precision=FP8),
    ),
)
MLP_TANH = Op(
    "layer_norm_mlp_tanh",
    "MLP half of a block, tanh GELU",
    inputs,
    plain("tanh"),
    work,
    providers=(
        *common("gelu_tanh", "tanh"),
        Provider("apex", apex, "apex"),
        Provider("transformer_engine", transformer_engine, "transformer-engine"),
    ),
)
