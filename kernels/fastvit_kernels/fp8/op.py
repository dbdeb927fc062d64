"""The public FP8 linear layer and its gradient."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.checks import check_floating, check_parameter
from fastvit_kernels.dispatch import autocast_dtype
from fastvit_kernels.fp8.products import Layer
from fastvit_kernels.fp8.setting import LAYERS, Fp8
from fastvit_kernels.layer_norm.op import as_rows
from fastvit_kernels.registration import no_autocast


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor, *, fp8: Fp8, layer: str) -> Tensor:
    """x w^T + bias, forward and backward with FP8 operands: all three products.

    Args:
        x: [..., K], bfloat16 on a GPU, any floating dtype elsewhere.
        weight, bias: [N, K] and [N], the dtype of x; N and K are multiples of 16.
        fp8: the scaling, and where scales that are out of range are counted. Its `layers` are not looked at.
        layer: for which of `LAYERS`.

    Activations and weights are E4M3, gradients E5M2, or E4M3 with a scale per row (Micikevicius et al. 2022); scales
    follow from the operands themselves. Both operands are quantised anew in either pass: nothing but x and weight is
    kept. Returns [..., N] in the dtype of x. Raises ValueError for a wrong shape, device or layer, TypeError for a
    wrong dtype and RuntimeError on a GPU that has no FP8 products, or under torch.compile.
    """
    check_floating("x", x)
    if layer not in LAYERS:
        raise ValueError(f"layer must be one of {', '.join(LAYERS)}, got {layer!r}")
    if x.ndim == 0 or weight.ndim != 2:
        raise ValueError(f"x must be [..., K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}")
    check_parameter("weight", weight, [weight.shape[0], x.shape[-1]], like=x)
    check_parameter("bias", bias, weight.shape[:1], like=x)
    check_usable(x, x.dtype)
    return Linear.apply(x, weight, bias, fp8, layer)


def linear(x: Tensor, weight: Tensor, bias: Tensor, fp8: Fp8 | None, layer: str) -> Tensor:
    """The layer of this name as a block has it: `fp8_linear` if it is among those of `fp8`, else that of PyTorch."""
    if fp8 is None or layer not in fp8.layers:
        return F.linear(x, weight, bias)
    if (cast := autocast_dtype(x)) is not None:
        x, weight, bias = x.to(cast), weight.to(cast), bias.to(cast)
    return fp8_linear(x, weight, bias, fp8=fp8, layer=layer)


def check_usable(x: Tensor, dtype: torch.dtype) -> None:
    """Raises TypeError or RuntimeError unless a layer of this dtype can act on x in FP8, here and now."""
    if x.is_cuda and dtype != torch.bfloat16:
        raise TypeError(f"FP8 layers compute in torch.bfloat16 on a GPU, got {dtype}")
    if torch.compiler.is_compiling():
        raise RuntimeError("FP8 layers cannot be compiled: leave fp8 out, or torch.compile")


class Linear(torch.autograd.Function):
    """`fp8_linear` with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, fp8: Fp8, layer: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.fp8, ctx.layer, ctx.bias_dtype = fp8, layer, bias.dtype
        with torch.cuda.device_of(x), no_autocast(x.device):  # Triton launches on the current device
            y = Layer(fp8, layer, as_rows(weight)).forward(as_rows(x), bias.contiguous())
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad, grad_x, grad_weight, grad_bias = as_rows(grad_y), None, None, None
        with torch.cuda.device_of(x), no_autocast(x.device):
            layer = Layer(ctx.fp8, ctx.layer, as_rows(weight), learns=needs_weight, passes_on=needs_x)
            if needs_x:
                grad_x = layer.input_gradient(grad).view(x.shape)
            if needs_weight:
                grad_weight = layer.weight_gradient(grad, as_rows(x))
            if needs_bias:
                grad_bias = grad.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None
