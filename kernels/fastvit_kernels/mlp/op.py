from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastvit_kernels.checks import check_parameter, check_rate, check_tokens
from fastvit_kernels.dispatch import uses_triton
from fastvit_kernels.gemm import products
from fastvit_kernels.layer_norm import layer_norm
from fastvit_kernels.layer_norm.op import as_rows
from fastvit_kernels.layer_norm.op import launch_backward as layer_norm_backward
from fastvit_kernels.layer_norm.op import launch_forward as layer_norm_forward
from fastvit_kernels.mlp import reference
from fastvit_kernels.registration import register_gradient, register_op
from fastvit_kernels.residual import draw_path_scale

Activation = Literal["gelu", "gelu_tanh"]
Recompute = Literal["none", "gelu", "all"]


def layer_norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    eps: float,
    activation: Activation = "gelu",
    layer_scale: Tensor | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    recompute: Recompute = "gelu",
) -> Tensor:
    """The MLP half of a pre-norm block: x + drop_path(layer_scale * dropout(fc2(dropout(act(fc1(norm(x))))))).

    Args:
        x: [B, N, D], any floating dtype.
        norm_weight, norm_bias: [D], the dtype of x or float32.
        fc1_weight, fc1_bias: [M, D] and [M], for any hidden width M.
        fc2_weight, fc2_bias: [D, M] and [D].
        activation: "gelu" is the exact erf form, "gelu_tanh" the tanh form (Hendrycks and Gimpel 2016).
        layer_scale: [D], the dtype of x or float32; None leaves it out.
        dropout: rate on the activations and, drawn apart, on the output (Dosovitskiy et al. 2021, appendix B.1).
        drop_path: rate at which a sample's whole branch is dropped; kept branches are scaled by 1 / (1 - drop_path).
        recompute: what the kernels' backward pass computes again instead of keeping it: nothing, the GELU, or the
            normalisation too. Gradients are the same. No effect on the reference, or with dropout, where autograd keeps
            all.

    Rates are active whenever above 0. Returns [B, N, D] in the dtype of x, also under autocast, which acts as on
    `torch.nn.functional.linear`: products run in its dtype, the normalisation and the sum with x in that of x. Raises
    ValueError for a wrong shape, device, rate, activation or recompute and TypeError for a wrong dtype.
    """
    check_tokens("x", x)
    width, hidden = x.shape[-1], fc1_weight.shape[0]
    check_parameter("norm_weight", norm_weight, [width], like=x, fp32_allowed=True)
    check_parameter("norm_bias", norm_bias, [width], like=x, fp32_allowed=True)
    check_parameter("fc1_weight", fc1_weight, [hidden, width], like=x)
    check_parameter("fc1_bias", fc1_bias, [hidden], like=x)
    check_parameter("fc2_weight", fc2_weight, [width, hidden], like=x)
    check_parameter("fc2_bias", fc2_bias, [width], like=x)
    if layer_scale is not None:
        check_parameter("layer_scale", layer_scale, [width], like=x, fp32_allowed=True)
    if activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
    if recompute not in get_args(Recompute):
        raise ValueError(f"recompute must be one of {', '.join(get_args(Recompute))}, got {recompute!r}")
    check_rate("dropout", dropout)
    check_rate("drop_path", drop_path)
    norm, fc1, fc2 = (norm_weight, norm_bias), (fc1_weight, fc1_bias), (fc2_weight, fc2_bias)
    if not uses_triton(x):
        return reference.layer_norm_mlp(x, *norm, *fc1, *fc2, eps, activation, layer_scale, dropout, drop_path)
    if dropout > 0:
        normed = layer_norm(x, *norm, eps=eps)
        return reference.mlp(x, normed, *fc1, *fc2, activation, layer_scale, dropout, drop_path)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(torch.promote_types(x.dtype, dtype))
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = (t.to(dtype) for t in (*fc1, *fc2))
    path_scale = draw_path_scale(x, drop_path)
    return layer_norm_mlp_op(
        x,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        layer_scale,
        path_scale,
        eps,
        activation == "gelu_tanh",
        recompute,
    )[0]


# Matrices are [T, D] and [T, M] inside, with T = B * N tokens. Operators cannot return None, so what is not kept for
# the backward pass is an empty tensor.


def launch_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    eps: float,
    tanh: bool,
    recompute: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with no_autocast(x.device):
        normed, mean, rstd = normalise(x, norm_weight, norm_bias, eps, fc1_weight.dtype)
        pre, post = products.linear_gelu(normed, as_rows(fc1_weight), fc1_bias.contiguous(), tanh)
        y = products.linear_residual(
            post,
            as_rows(fc2_weight),
            fc2_bias.contiguous(),
            as_rows(x),
            None if layer_scale is None else layer_scale.contiguous(),
            path_scale,
            rows_per_sample=x.shape[1],
        )
    if recompute == "all":
        normed = normed.new_empty(0)
    if recompute != "none":
        post = post.new_empty(0)
    return y.view(x.shape), mean, rstd, normed, pre, post


def fake_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    eps: float,
    tanh: bool,
    recompute: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, (hidden, width) = x.shape[0] * x.shape[1], fc1_weight.shape
    y = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    normed = fc1_weight.new_empty(0 if recompute == "all" else (tokens, width))
    pre = fc1_weight.new_empty(tokens, hidden)
    post = fc1_weight.new_empty((tokens, hidden) if recompute == "none" else 0)
    return y, mean, rstd, normed, pre, post


def launch_backward(
    grad_y: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    normed: Tensor,
    pre: Tensor,
    post: Tensor,
    eps: float,
    tanh: bool,
    recompute: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    fc1_weight, fc2_weight, dtype = as_rows(fc1_weight), as_rows(fc2_weight), fc2_weight.dtype
    with no_autocast(x.device):
        if layer_scale is not None:
            layer_scale = layer_scale.contiguous()
        # the weight gradient before LayerScale gives that of LayerScale too, for which fc2's output is not kept
        grad, scaled_grad, partial = products.branch_gradient(
            as_rows(grad_y), layer_scale, path_scale, x.shape[1], dtype
        )
        grad_pre, grad_fc1_bias, recomputed = products.gelu_gradient(
            scaled_grad, fc2_weight, pre, tanh, recompute=recompute != "none"
        )
        grad_fc2_weight = products.weight_gradient(grad, post if recompute == "none" else recomputed)
        del recomputed  # [T, M]
        if layer_scale is None:
            grad_fc2_bias, grad_layer_scale = (
                products.sum_partial(partial, fc2_bias.new_empty(fc2_bias.shape)),
                x.new_empty(0),
            )
        else:
            grad_fc2_weight, grad_fc2_bias, grad_layer_scale = products.layer_scale_gradients(
                grad_fc2_weight,
                fc2_weight,
                fc2_bias.contiguous(),
                layer_scale,
                products.sum_partial(partial, x.new_empty(x.shape[-1], dtype=torch.float32)),
            )
        if recompute == "all":
            normed, _, _ = normalise(x, norm_weight, norm_bias, eps, dtype)
        grad_fc1_weight = products.weight_gradient(grad_pre, normed)
        grad_normed = products.input_gradient(grad_pre, fc1_weight).view(x.shape)
        grad_x, _, _, grad_norm_weight, grad_norm_bias = layer_norm_backward(
            grad_y, grad_normed, x, None, x.dtype, None, None, norm_weight, norm_bias, mean, rstd
        )
    return (
        grad_x,
        grad_norm_weight,
        grad_norm_bias,
        grad_fc1_weight,
        grad_fc1_bias,
        grad_fc2_weight,
        grad_fc2_bias,
        grad_layer_scale,
    )


def fake_backward(
    grad_y: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    layer_scale: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    likes = (x, norm_weight, norm_bias, fc1_weight, fc1_weight[:, 0], fc2_weight, fc2_bias)
    grad_layer_scale = x.new_empty(0) if layer_scale is None else layer_scale.new_empty(layer_scale.shape)
    return (*(like.new_empty(like.shape) for like in likes), grad_layer_scale)


def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Layer normalisation of x [B, N, D] as [T, D] in `dtype`, and the statistics."""
    _, normed, mean, rstd = layer_norm_forward(x, None, None, None, weight, bias, eps)
    return as_rows(normed).to(dtype), mean, rstd


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Operands have their dtypes by now: the products inside must not be cast again."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, norm_weight, norm_bias, fc1_weight, _, fc2_weight, fc2_bias, layer_scale, path_scale, *options = inputs
    ctx.options = options
    ctx.save_for_backward(
        x, norm_weight, norm_bias, fc1_weight, fc2_weight, fc2_bias, layer_scale, path_scale, *output[1:]
    )
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_y: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    *gradients, grad_layer_scale = layer_norm_mlp_backward_op(grad_y, *ctx.saved_tensors, *ctx.options)
    layer_scale = ctx.saved_tensors[6]
    return *gradients, None if layer_scale is None else grad_layer_scale, None, None, None, None


layer_norm_mlp_op = register_op(
    "layer_norm_mlp(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias,"
    " Tensor fc2_weight, Tensor fc2_bias, Tensor? layer_scale, Tensor? path_scale, float eps, bool tanh, str recompute)"
    " -> (Tensor y, Tensor mean, Tensor rstd, Tensor normed, Tensor pre, Tensor post)",
    launch_forward,
    fake_forward,
)
layer_norm_mlp_backward_op = register_op(
    "layer_norm_mlp_backward(Tensor grad_y, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight,"
    " Tensor fc2_weight, Tensor fc2_bias, Tensor? layer_scale, Tensor? path_scale, Tensor mean, Tensor rstd,"
    " Tensor normed, Tensor pre, Tensor post, float eps, bool tanh, str recompute)"
    " -> (Tensor grad_x, Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor grad_fc1_weight, Tensor grad_fc1_bias,"
    " Tensor grad_fc2_weight, Tensor grad_fc2_bias, Tensor grad_layer_scale)",
    launch_backward,
    fake_backward,
)
register_gradient(layer_norm_mlp_op, layer_norm_mlp_backward_op, setup_context, backward)
