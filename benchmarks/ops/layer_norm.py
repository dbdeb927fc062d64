"""Layer normalisation, alone and after the sum that ends a residual half-block."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvit_kernels
from benchmarks.apex_detection import need_apex
from benchmarks.peers import MAX_AUTOTUNE, compiled, need, need_cuda, need_vision
from benchmarks.registry import Binder, Bound, Case, Draw, Inputs, Op, Provider, Work, functional, leaves_of

EPS = 1e-6
Norm = Callable[..., Tensor]  # (x [B, N, D], weight [D], bias [D]) -> [B, N, D]


def inputs(case: Case, draw: Draw) -> dict[str, Tensor]:
    width = case.shape.width
    return {
        "x": draw.normal(case.batch, case.shape.tokens, width),
        "weight": draw.normal(width, scale=0.1, mean=1.0),
        "bias": draw.normal(width, scale=0.1),
    }


def inputs_of_sum(case: Case, draw: Draw) -> dict[str, Tensor]:
    drawn = inputs(case, draw)
    return {"x": drawn["x"], "branch": draw.normal(*drawn["x"].shape), **drawn}


def work(case: Case) -> dict[str, Work]:
    part = case.rows * case.shape.width * case.dtype.itemsize
    return {"forward": Work(0, 2 * part), "backward": Work(0, 3 * part)}


def work_of_sum(case: Case) -> dict[str, Work]:
    part = case.rows * case.shape.width * case.dtype.itemsize
    return {"forward": Work(0, 4 * part), "backward": Work(0, 4 * part)}


def plain(case: Case) -> Norm:
    """Statistics in float32 at least, as everybody has them."""

    def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
        return (normed * weight + bias).to(x.dtype)

    return normalise


def torch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def plain_sum(case: Case) -> Callable[..., tuple[Tensor, Tensor]]:
    return after_sum(plain(case))


def after_sum(norm: Norm) -> Callable[..., tuple[Tensor, Tensor]]:
    def add_and_normalise(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        y = x + branch
        return y, norm(y, weight, bias)

    return add_and_normalise


def apex(case: Case) -> Norm:
    need_cuda(case)
    norm = need_apex("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    return lambda x, weight, bias: norm(x, weight, bias, x.shape[-1:], EPS)


def apex_fast(case: Case) -> Callable[..., Tensor]:
    need_cuda(case)
    norm = need_apex("apex.contrib.layer_norm.layer_norm").FastLayerNormFN
    return lambda x, weight, bias: norm.apply(x, weight, bias, EPS)


def flash_attn(case: Case) -> Norm:
    need_cuda(case)
    norm = need("flash_attn.ops.triton.layer_norm").layer_norm_fn
    return lambda x, weight, bias: norm(x, weight, bias, eps=EPS)


def flash_attn_sum(case: Case) -> Callable[..., tuple[Tensor, Tensor]]:
    need_cuda(case)
    norm = need("flash_attn.ops.triton.layer_norm").layer_norm_fn

    def add_and_normalise(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        normed, y = norm(branch, weight, bias, residual=x, eps=EPS, prenorm=True)
        return y, normed

    return add_and_normalise


def liger(case: Case) -> Norm:
    need_cuda(case)
    norm = need("liger_kernel.transformers.functional").liger_layer_norm
    return lambda x, weight, bias: norm(x, weight, bias, EPS)


@lru_cache
def quack_norms() -> Any:
    return need("quack.rmsnorm")


class QuackNorm(torch.autograd.Function):
    """QuACK has both passes of layer normalisation as functions; weight and bias are float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, rstd, mean = quack_norms().layernorm_fwd(rows, weight.float(), bias.float(), EPS, True, True)
        ctx.save_for_backward(rows, weight, rstd, mean)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, weight, rstd, mean = ctx.saved_tensors
        grad = grads[0].reshape(rows.shape)
        dx, dw, db = quack_norms().layernorm_bwd(rows, weight.float(), grad, rstd, mean)
        return dx.view(grads[0].shape), dw.to(weight.dtype), db.to(weight.dtype)


def quack(case: Case) -> Norm:
    need_cuda(case)
    quack_norms()
    return QuackNorm.apply


def timm(case: Case) -> Norm:
    norm = need_vision("timm.layers").LayerNorm
    module = norm(case.shape.width, eps=EPS).to(case.device, case.dtype)
    return lambda x, weight, bias: torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))


def transformer_engine(case: Case) -> Binder:
    need_cuda(case)
    engine = need("transformer_engine.pytorch")

    def bind(given: Inputs) -> Bound:
        module = engine.LayerNorm(case.shape.width, eps=EPS).to(case.device, case.dtype)
        with torch.no_grad():
            module.weight.copy_(given["weight"])
            module.bias.copy_(given["bias"])
        x = leaves_of(case.op, given)["x"]
        return Bound(lambda: (module(x),), {"x": x, "weight": module.weight, "bias": module.bias})

    return bind


LAYER_NORM = Op(
    "layer_norm",
    "layer normalisation",
    inputs,
    plain,
    work,
    providers=(
        Provider("fastvit", functional(lambda case: fastvit_kernels.layer_norm)),
        Provider("eager", functional(lambda case: torch_norm)),
        Provider("timm", functional(timm), "timm"),
        Provider("compile", functional(lambda case: compiled(torch_norm)), slow=True),
        Provider("compile max-autotune", functional(lambda case: compiled(torch_norm, MAX_AUTOTUNE)), slow=True),
        Provider("apex", functional(apex), "apex"),
        Provider("apex fast", functional(apex_fast), "apex"),
        Provider("flash-attn", functional(flash_attn), "flash-attn"),
        Provider("quack", functional(quack), "quack-kernels"),
        Provider("liger", functional(liger), "liger-kernel"),
        Provider("transformer_engine", transformer_engine, "transformer-engine"),
    ),
)
ADD_LAYER_NORM = Op(
    "add_layer_norm",
    "residual sum, then layer normalisation",
    inputs_of_sum,
    plain_sum,
    work_of_sum,
    providers=(
        Provider("fastvit", functional(lambda case: fastvit_kernels.add_layer_norm)),
        Provider("eager", functional(lambda case: after_sum(torch_norm))),
        Provider("compile", functional(lambda case: compiled(after_sum(torch_norm))), slow=True),
        Provider(
            "compile max-autotune", functional(lambda case: compiled(after_sum(torch_norm), MAX_AUTOTUNE)), slow=True
        ),
        Provider("apex", functional(lambda case: after_sum(apex(case))), "apex"),
        Provider("flash-attn", functional(flash_attn_sum), "flash-attn"),
        Provider("quack", functional(lambda case: after_sum(quack(case))), "quack-kernels"),
        Provider("liger", functional(lambda case: after_sum(liger(case))), "liger-kernel"),
    ),
)
