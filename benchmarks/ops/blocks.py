"""The attention half of a block, and whole blocks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit_kernels
from benchmarks.ops import attention, mlp
from benchmarks.ops.layer_norm import EPS, torch_norm
from benchmarks.ops.layer_norm import plain as plain_norm
from benchmarks.peers import MAX_AUTOTUNE, compiled, need_vision
from benchmarks.registry import Binder, Bound, Case, Draw, Inputs, Op, Provider, Unusable, Work, functional, leaves_of

# Parameters of a block by timm's names, as inputs: a dot is no part of an argument's name.
HALF_NAMES = {
    "norm_weight": "norm1.weight",
    "norm_bias": "norm1.bias",
    "qkv_weight": "attn.qkv.weight",
    "qkv_bias": "attn.qkv.bias",
    "proj_weight": "attn.proj.weight",
    "proj_bias": "attn.proj.bias",
}
BLOCK_NAMES = HALF_NAMES | {
    "norm2_weight": "norm2.weight",
    "norm2_bias": "norm2.bias",
    "fc1_weight": "mlp.fc1.weight",
    "fc1_bias": "mlp.fc1.bias",
    "fc2_weight": "mlp.fc2.weight",
    "fc2_bias": "mlp.fc2.bias",
}


def inputs(case: Case, draw: Draw) -> dict[str, Tensor]:
    width = case.shape.width
    return {
        "x": draw.normal(case.batch, case.shape.tokens, width),
        "norm_weight": draw.normal(width, scale=0.1, mean=1.0),
        "norm_bias": draw.normal(width, scale=0.1),
        "qkv_weight": draw.normal(3 * width, width, scale=width**-0.5),
        "qkv_bias": draw.normal(3 * width, scale=0.02),
        "proj_weight": draw.normal(width, width, scale=width**-0.5),
        "proj_bias": draw.normal(width, scale=0.02),
    }


def inputs_of_block(case: Case, draw: Draw) -> dict[str, Tensor]:
    of_mlp = mlp.inputs(case, draw)
    of_mlp["norm2_weight"], of_mlp["norm2_bias"] = of_mlp.pop("norm_weight"), of_mlp.pop("norm_bias")
    return of_mlp | inputs(case, draw)


def work(case: Case) -> dict[str, Work]:
    width, size = case.shape.width, case.dtype.itemsize
    products, stream, weights = 8 * case.rows * width**2, case.rows * width, 4 * width**2
    inside = attention.work(case)
    return {
        # qkv and what attention gives are written once and read once
        "forward": Work(products + inside["forward"].flops, size * (2 * stream + 8 * stream + weights)),
        "backward": Work(2 * products + inside["backward"].flops, size * (3 * stream + 12 * stream + 2 * weights)),
    }


def work_of_block(case: Case) -> dict[str, Work]:
    halves = work(case), mlp.work(case)
    return {
        name: Work(sum(half[name].flops for half in halves), sum(half[name].bytes for half in halves))
        for name in ("forward", "backward")
    }


def half_block(case: Case, norm: Callable[..., Tensor], attend: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    heads = case.shape.heads

    def run(
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor,
    ) -> Tensor:
        qkv = F.linear(norm(x, norm_weight, norm_bias), qkv_weight, qkv_bias).unflatten(-1, (3, heads, -1))
        return x + F.linear(attend(qkv), proj_weight, proj_bias)

    return run


def block(attention_half: Callable[..., Tensor], mlp_half: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(
        x: Tensor,
        norm2_weight: Tensor,
        norm2_bias: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        **of_attention: Tensor,
    ) -> Tensor:
        x = attention_half(x, **of_attention)
        return mlp_half(x, norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)

    return run


def plain(case: Case) -> Callable[..., Tensor]:
    return half_block(case, plain_norm(case), attention.plain(case))


def plain_block(case: Case) -> Callable[..., Tensor]:
    return block(plain(case), mlp.half_block(plain_norm(case), "none"))


def eager(case: Case) -> Callable[..., Tensor]:
    return half_block(case, torch_norm, attention.sdpa)


def eager_block(case: Case) -> Callable[..., Tensor]:
    return block(eager(case), mlp.half_block(torch_norm, "none"))


def ours(case: Case) -> Callable[..., Tensor]:
    return lambda **given: fastvit_kernels.attention_block(**given, heads=case.shape.heads, eps=EPS)


def our_block(case: Case) -> Binder:
    shape = case.shape
    return of_module(case, lambda: fastvit_kernels.FusedBlock(shape.width, shape.heads, shape.mlp_dim, eps=EPS))


def timm_block(mode: str | None = "eager") -> Callable[[Case], Binder]:
    def make(case: Case) -> Binder:
        shape, vit = case.shape, need_vision("timm.models.vision_transformer")
        ratio = shape.mlp_dim / shape.width

        def module() -> nn.Module:
            norm = lambda width, **options: nn.LayerNorm(width, eps=EPS, **options)  # noqa: E731
            return vit.Block(shape.width, shape.heads, mlp_ratio=ratio, qkv_bias=True, norm_layer=norm)

        return of_module(case, module, None if mode == "eager" else mode or "default")

    return make


def of_module(case: Case, make: Callable[[], nn.Module], compile_mode: str | None = None) -> Binder:
    """A block as a module with timm's names for its parameters."""

    def bind(given: Inputs) -> Bound:
        module = mlp.loaded(case, make(), BLOCK_NAMES, given).train()
        if compile_mode is not None:
            module.compile(dynamic=False, mode=compile_mode)
        x = leaves_of(case.op, given)["x"]
        return Bound(lambda: (module(x),), {"x": x} | mlp.parameters(module, BLOCK_NAMES))

    return bind


def transformers_block(case: Case) -> Binder:
    vit = need_vision("transformers.models.vit.modeling_vit")
    if not hasattr(vit, "ViTLayer"):
        raise Unusable("this version of transformers has no ViTLayer")
    config = need_vision("transformers").ViTConfig(
        hidden_size=case.shape.width,
        num_attention_heads=case.shape.heads,
        intermediate_size=case.shape.mlp_dim,
        layer_norm_eps=EPS,
        attn_implementation="sdpa",
    )
    names = {
        "norm_weight": "layernorm_before.weight",
        "norm_bias": "layernorm_before.bias",
        "proj_weight": "attention.o_proj.weight",
        "proj_bias": "attention.o_proj.bias",
        "norm2_weight": "layernorm_after.weight",
        "norm2_bias": "layernorm_after.bias",
        "fc1_weight": "mlp.fc1.weight",
        "fc1_bias": "mlp.fc1.bias",
        "fc2_weight": "mlp.fc2.weight",
        "fc2_bias": "mlp.fc2.bias",
    }

    def bind(given: Inputs) -> Bound:
        module = mlp.loaded(case, vit.ViTLayer(config), names, given).train()
        with torch.no_grad():  # q, k and v are layers of their own here
            for letter, weight, bias in zip(
                "qkv", given["qkv_weight"].chunk(3), given["qkv_bias"].chunk(3), strict=True
            ):
                layer: Any = module.get_submodule(f"attention.{letter}_proj")
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
        x = leaves_of(case.op, given)["x"]

        def forward() -> tuple[Tensor]:
            out = module(x)
            return (out if isinstance(out, Tensor) else out[0],)

        of_qkv = {
            f"{letter}.{kind}": f"attention.{letter}_proj.{kind}" for letter in "qkv" for kind in ("weight", "bias")
        }
        return Bound(forward, {"x": x} | mlp.parameters(module, names | of_qkv))

    return bind


ATTENTION_BLOCK = Op(
    "attention_block",
    "attention half of a block",
    inputs,
    plain,
    work,
    providers=(
        Provider("fastvit", functional(ours)),
        Provider("eager", functional(eager)),
        Provider("compile", functional(lambda case: compiled(eager(case))), slow=True),
        Provider("compile max-autotune", functional(lambda case: compiled(eager(case), MAX_AUTOTUNE)), slow=True),
    ),
)
BLOCK = Op(
    "block",
    "a whole block",
    inputs_of_block,
    plain_block,
    work_of_block,
    providers=(
        Provider("fastvit", our_block),
        Provider("eager", functional(eager_block)),
        Provider("timm", timm_block(), "timm"),
        Provider("timm compile", timm_block(None), "timm", slow=True),
        Provider("timm compile max-autotune", timm_block(MAX_AUTOTUNE), "timm", slow=True),
        Provider("transformers", transformers_block, "transformers"),
    ),
)
