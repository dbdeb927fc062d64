"""A half-block, or a block, whose products are in FP8: its launches as a function with a gradient.

It is no registered operator, since what counts scales that are out of range is written by both passes, which PyTorch
does not allow an operator with a gradient. So it cannot be compiled by torch.compile.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastvit_kernels.fp8.setting import Fp8


def in_fp8(half: ModuleType, fp8: Fp8, *arguments: Any) -> Tensor:
    """What the operator of `half`, a module such as `mlp.op`, gives for these arguments of its `Call`."""
    result: Tensor = Fp8Block.apply(half, fp8, *arguments)
    return result


class Fp8Block(torch.autograd.Function):
    """The first output of the launches of `half`; the others serve the gradient."""

    @staticmethod
    def forward(ctx: Any, half: ModuleType, fp8: Fp8, *arguments: Any) -> Tensor:
        with torch.cuda.device_of(arguments[0]):
            outputs = half.launch_forward(*arguments, fp8)
        half.setup_context(ctx, arguments, outputs)
        ctx.non_differentiable = None  # marks of what is not given back
        ctx.half, ctx.fp8, ctx.arguments = half, fp8, len(arguments)
        y: Tensor = outputs[0]
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        learned = len(ctx.half.LEARNED)
        needed = ctx.needs_input_grad[2 : 2 + learned]
        with torch.cuda.device_of(grad_y):
            gradients = ctx.half.launch_backward(grad_y, needed, *ctx.saved_tensors, *ctx.options, ctx.fp8)
        given = (gradient if need else None for gradient, need in zip(gradients, needed, strict=True))
        return None, None, *given, *(None,) * (ctx.arguments - learned)
