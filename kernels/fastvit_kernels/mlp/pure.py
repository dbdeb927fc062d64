"""Two linear layers with a GELU between them, without normalisation and residual: checks, launches and gradient."""

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from fastvit_kernels.checks import check_floating, check_parameter
from fastvit_kernels.column_sums import ColumnSums
from fastvit_kernels.dispatch import autocast_dtype, uses_triton
from fastvit_kernels.gemm import products
from fastvit_kernels.layer_norm.op import as_rows
from fastvit_kernels.mlp import reference
from fastvit_kernels.mlp.op import Activation, is_kept
from fastvit_kernels.registration import no_autocast, register_gradient, register_op


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    activation: Activation = "gelu",
) -> Tensor:
    """The MLP of a Transformer alone: fc2(act(fc1(x))).

    Args:
        x: [..., D], any floating dtype.
        fc1_weight, fc1_bias: [M, D] and [M], the dtype of x; under autocast any that it casts.
        fc2_weight, fc2_bias: [K, M] and [K], likewise.
        activation: "gelu" is the exact erf form, "gelu_tanh" the tanh form (Hendrycks and Gimpel 2016).

    Returns [..., K] in the dtype of x; under autocast, which acts as on `torch.nn.functional.linear`, in its dtype. The
    backward pass of the kernels computes the GELU again from its input and keeps nothing that no gradient needs. Raises
    ValueError for a wrong shape, device or activation and TypeError for a wrong dtype.
    """
    check_floating("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., D], got {list(x.shape)}")
    hidden, width, cast = fc1_weight.shape[:1], fc2_weight.shape[:1], autocast_dtype(x)
    check_parameter("fc1_weight", fc1_weight, [*hidden, x.shape[-1]], like=x, cast_to=cast)
    check_parameter("fc1_bias", fc1_bias, hidden, like=x, cast_to=cast)
    check_parameter("fc2_weight", fc2_weight, [*width, *hidden], like=x, cast_to=cast)
    check_parameter("fc2_bias", fc2_bias, width, like=x, cast_to=cast)
    if activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
    if not uses_triton("mlp", x):
        return reference.branch(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, 0.0)
    if cast is not None:
        tensors = (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = (tensor.to(cast) for tensor in tensors)
    keep_pre = torch.is_grad_enabled() and any(t.requires_grad for t in (x, fc1_weight, fc1_bias, fc2_weight))
    return call_operator(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation == "gelu_tanh", keep_pre)


# Matrices are [T, D], [T, M] and [T, K] inside, with T tokens. What is not kept or not needed is an empty tensor [0].


def launch_forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    tanh: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and the input of the GELU [T, M]."""
    with no_autocast(x.device):
        pre, post = products.linear_gelu(as_rows(x), as_rows(fc1_weight), fc1_bias.contiguous(), tanh, keep_pre)
        y = products.linear(post, as_rows(fc2_weight), fc2_bias.contiguous())
    return y.view(*x.shape[:-1], len(fc2_weight)), pre


def fake_forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    tanh: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    tokens = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], len(fc2_weight)), x.new_empty((tokens, len(fc1_weight)) if keep_pre else 0)


def launch_backward(
    grad_y: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    pre: Tensor,
    tanh: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    gradients = fake_backward(grad_y, x, fc1_weight, fc2_weight, pre, tanh, needed)
    grad_x, grad_fc1_weight, grad_fc1_bias, grad_fc2_weight, grad_fc2_bias = gradients
    needs_x, needs_fc1_weight, needs_fc1_bias, needs_fc2_weight, needs_fc2_bias = needed
    grad, x_rows, fc1_weight, fc2_weight = (as_rows(t) for t in (grad_y, x, fc1_weight, fc2_weight))
    sums = ColumnSums()
    with no_autocast(x.device):
        if needs_fc2_bias:
            sums.add(products.scale_gradient(grad, None), grad_fc2_bias)
        post = pre.new_empty(0)
        if needs_x or needs_fc1_weight or needs_fc1_bias:
            grad_pre, partial, post = products.gelu_gradient(
                grad, fc2_weight, pre, tanh, needs_fc2_weight, column_sum=needs_fc1_bias
            )
            if needs_fc1_bias:
                sums.add(partial, grad_fc1_bias)
        if needs_fc2_weight:
            grad_fc2_weight = products.weight_gradient(grad, post if is_kept(post) else products.gelu(pre, tanh))
        if needs_fc1_weight:
            grad_fc1_weight = products.weight_gradient(grad_pre, x_rows)
        if needs_x:
            grad_x = products.input_gradient(grad_pre, fc1_weight).view(x.shape)
        sums.launch()
    return grad_x, grad_fc1_weight, grad_fc1_bias, grad_fc2_weight, grad_fc2_bias


def fake_backward(
    grad_y: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    pre: Tensor,
    tanh: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    shapes = x.shape, fc1_weight.shape, fc1_weight.shape[:1], fc2_weight.shape, fc2_weight.shape[:1]
    return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, needed, strict=True))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, fc1_weight, _, fc2_weight, _, ctx.tanh, _ = inputs
    ctx.save_for_backward(x, fc1_weight, fc2_weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_y: Tensor, _: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:5]
    gradients = mlp_backward_op(grad_y, *ctx.saved_tensors, ctx.tanh, needed)
    return *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), None, None


mlp_op = register_op(
    "mlp(Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, bool tanh, bool keep_pre)"
    " -> (Tensor y, Tensor pre)",
    launch_forward,
    fake_forward,
)
mlp_backward_op = register_op(
    "mlp_backward(Tensor grad_y, Tensor x, Tensor fc1_weight, Tensor fc2_weight, Tensor pre, bool tanh, bool[] needed)"
    " -> (Tensor grad_x, Tensor grad_fc1_weight, Tensor grad_fc1_bias, Tensor grad_fc2_weight, Tensor grad_fc2_bias)",
    launch_backward,
    fake_backward,
)
call_operator = register_gradient(mlp_op, mlp_backward_op, setup_context, backward)
