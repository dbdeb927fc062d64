"""What the gradients of both halves of a pre-norm block share: the end of the branch and the normalisation before it.

A half-block is x + path_scale * layer_scale * (inner(norm(x)) w^T + bias). These functions run inside registered
operators and know no autograd.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.column_sums import ColumnSums
from fastvit_kernels.fp8.products import Layer
from fastvit_kernels.gemm import products
from fastvit_kernels.gemm.products import BranchGradient
from fastvit_kernels.layer_norm.op import launch_gradient


def empty_gradients(learned: Sequence[Any], needed: Sequence[bool]) -> tuple[Tensor, ...]:
    """A tensor like each input that may have a gradient, empty where that is not needed: for fake implementations."""
    x = learned[0]
    return tuple(
        x.new_empty(0) if not need else like.new_empty(like.shape) for like, need in zip(learned, needed, strict=True)
    )


def needed_gradients(found: Sequence[Any], needed: Sequence[bool], x: Tensor) -> tuple[Tensor, ...]:
    """What an operator returns, which cannot be None: an empty tensor for what is not needed."""
    return tuple(gradient if need else x.new_empty(0) for gradient, need in zip(found, needed, strict=True))


class End(NamedTuple):
    """The end of a branch, as far as gradients need it, and which of them are needed."""

    weight: Tensor  # [D, K], adjacent columns
    bias: Tensor  # [D]
    layer_scale: Tensor | None  # [D], contiguous
    path_scale: Tensor | None  # [B] float32
    needs_weight: bool
    needs_bias: bool
    needs_layer_scale: bool
    needs_inner: bool  # the gradient of inner(norm(x))
    fp8: Layer | None = None  # if its products are in FP8

    @property
    def needs_product(self) -> bool:
        """The weight gradient before LayerScale gives that of LayerScale too: the branch is not kept for it."""
        return self.needs_weight or self.needs_layer_scale

    @property
    def needs_sum(self) -> bool:
        """Whether the column sums of the gradient are needed."""
        return self.needs_bias or (self.needs_product and self.layer_scale is not None)

    def changes(self, grad_y: Tensor) -> bool:
        """Whether the gradient of the branch is another matrix than that of the half-block's output."""
        scaled = self.path_scale is not None or self.layer_scale is not None
        return scaled or grad_y.dtype != self.weight.dtype

    def gradient(self, grad_y: Tensor, column_sum: bool) -> BranchGradient:
        """Of the branch, given that of the half-block's output, [T, D]."""
        return products.branch_gradient(
            grad_y,
            self.layer_scale,
            self.path_scale,
            self.weight.dtype,
            unscaled=self.needs_product,
            scaled=self.needs_inner,
            column_sum=column_sum,
        )

    def input_gradient(self, grad: BranchGradient) -> Tensor:
        """Of inner(norm(x)), [T, K]."""
        if self.fp8 is None:
            return products.input_gradient(grad.scaled, self.weight)
        return self.fp8.input_gradient(grad.scaled)

    def parameter_gradients(
        self, grad: BranchGradient, inner: Tensor, sums: ColumnSums
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of weight, bias and layer_scale, as far as needed; `sums` may write that of the bias."""
        product = None
        if self.needs_product:
            multiply = products.weight_gradient if self.fp8 is None else self.fp8.weight_gradient
            product = multiply(grad.unscaled, inner)
        if self.layer_scale is None:
            if not self.needs_bias or not grad.has_sums:
                return product, None, None
            grad_bias = torch.empty_like(self.bias)
            sums.add(grad.partial, grad_bias)
            return product, grad_bias, None
        if not self.needs_sum:
            return None, None, None
        column_sum = torch.empty_like(self.bias, dtype=torch.float32)
        sums.add(grad.partial, column_sum)
        sums.launch()  # what follows reads it
        if product is None:
            return None, (self.layer_scale * column_sum).to(self.bias.dtype), None
        return products.layer_scale_gradients(product, self.weight, self.bias, self.layer_scale, column_sum)


class Norm(NamedTuple):
    """The normalisation of x [T, D] at the start of a half-block, and which gradients are needed."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    rstd: Tensor
    needs_weight: bool
    needs_bias: bool

    def gradients(
        self,
        grad_y: Tensor,
        grad_normed: Tensor,
        sums: ColumnSums,
        *,
        grad_y_sum: Tensor | None = None,
        before: End | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, BranchGradient | None]:
        """Of x, weight and bias, in one pass, with grad_y [T, D] that of the residual.

        The pass may also add up the columns of grad_y, to `grad_y_sum` [D], and give the gradient of the branch that
        ended in x, if its `End` is given. Sums are there after `sums.launch()`.
        """
        x, learns = self.x, self.needs_weight or self.needs_bias
        grad_x = x.new_empty(*x.shape)
        unscaled = scaled = None
        if before is not None:
            needs_unscaled = before.needs_product or (before.needs_inner and before.layer_scale is None)
            if needs_unscaled and (before.path_scale is not None or before.weight.dtype != x.dtype):
                unscaled = x.new_empty(*x.shape, dtype=before.weight.dtype)
            if before.needs_inner and before.layer_scale is not None:
                scaled = x.new_empty(*x.shape, dtype=before.weight.dtype)
        partial = launch_gradient(
            grad_y,
            grad_normed,
            x,
            self.weight,
            self.mean,
            self.rstd,
            grad_x,
            layer_scale=None if before is None else before.layer_scale,
            path_scale=None if before is None else before.path_scale,
            unscaled=unscaled,
            grad_branch=scaled,
            learns=learns,
            sum_grad_y=grad_y_sum is not None,
            sum_branch=before is not None and before.needs_sum,
        )
        grad_weight, grad_bias = torch.empty_like(self.weight), torch.empty_like(self.bias)
        outs = ((grad_weight, grad_bias) if learns else ()) + (() if grad_y_sum is None else (grad_y_sum,))
        if outs:
            sums.add(partial[: len(outs)], *outs)
        if before is None:
            return grad_x, grad_weight, grad_bias, None
        if unscaled is None:
            unscaled = grad_x
        branch_sum = partial[-1] if before.needs_sum else grad_x.new_empty(0, dtype=torch.float32)
        return (
            grad_x,
            grad_weight,
            grad_bias,
            BranchGradient(unscaled, unscaled if scaled is None else scaled, branch_sum),
        )
