"""The public MLP half-block, its checks, launches and gradient."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastvit_kernels.checks import check_parameter, check_rate, check_tokens
from fastvit_kernels.dispatch import uses_triton
from fastvit_kernels.gemm import products
from fastvit_kernels.layer_norm.op import as_rows, normalise
from fastvit_kernels.layer_norm.op import launch_backward as layer_norm_backward
from fastvit_kernels.mlp import reference
from fastvit_kernels.registration import no_autocast, register_gradient, register_op
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
            normalisation too. Gradients are the same. What no gradient will need, as under `torch.no_grad` or with
            frozen parameters, is never kept. No effect on the reference, or with dropout, where autograd decides.

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
    if dropout > 0 or not uses_triton("mlp", x):
        return reference.layer_norm_mlp(x, *norm, *fc1, *fc2, eps, activation, layer_scale, dropout, drop_path)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(torch.promote_types(x.dtype, dtype))
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = (t.to(dtype) for t in (*fc1, *fc2))
    path_scale = draw_path_scale(x, drop_path)
    # what the backward pass will read: norm(x) for W_1, GELU's input for all below it, its output for all above
    below_gelu = any(tensor.requires_grad for tensor in (x, *norm, fc1_weight, fc1_bias))
    above_gelu = fc2_weight.requires_grad or (layer_scale is not None and layer_scale.requires_grad)
    learns, keep_post = torch.is_grad_enabled(), above_gelu and recompute == "none"
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
        learns and fc1_weight.requires_grad and recompute != "all",
        learns and (below_gelu or (above_gelu and not keep_post)),
        learns and keep_post,
    )[0]


# Matrices are [T, D] and [T, M] inside, with T = B * N tokens. Operators cannot return None, so what is not kept for
# the backward pass, and a gradient that is not needed, is an empty tensor [0].


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
    keep_normed: bool,
    keep_pre: bool,
    keep_post: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x_rows, fc1_weight, fc1_bias = as_rows(x), as_rows(fc1_weight), fc1_bias.contiguous()
    with no_autocast(x.device):
        if products.norm_in_epilogue("norm gelu", x, fc1_weight):
            normed = fc1_weight.new_empty(0)
            mean, rstd = products.row_statistics(x_rows, eps)
            norm = norm_weight.contiguous(), norm_bias.contiguous()
            pre, post = products.norm_linear_gelu(x_rows, mean, rstd, *norm, fc1_weight, fc1_bias, tanh, keep_pre)
        else:
            normed, mean, rstd = normalise(x, norm_weight, norm_bias, eps, fc1_weight.dtype)
            pre, post = products.linear_gelu(normed, fc1_weight, fc1_bias, tanh, keep_pre)
            if not keep_normed:
                normed = normed.new_empty(0)
        y = products.linear_residual(
            post,
            as_rows(fc2_weight),
            fc2_bias.contiguous(),
            x_rows,
            None if layer_scale is None else layer_scale.contiguous(),
            path_scale,
            rows_per_sample=x.shape[1],
        )
    if not keep_post:
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
    keep_normed: bool,
    keep_pre: bool,
    keep_post: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, (hidden, width) = x.shape[0] * x.shape[1], fc1_weight.shape
    keep_normed = keep_normed and not products.norm_in_epilogue("norm gelu", x, fc1_weight)
    y = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    normed = fc1_weight.new_empty((tokens, width) if keep_normed else 0)
    pre = fc1_weight.new_empty((tokens, hidden) if keep_pre else 0)
    post = fc1_weight.new_empty((tokens, hidden) if keep_post else 0)
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
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    needs = dict(zip(LEARNED, needed, strict=True))
    below_norm = needs["x"] or needs["norm_weight"] or needs["norm_bias"]
    below_gelu = below_norm or needs["fc1_weight"] or needs["fc1_bias"]
    above_gelu = needs["fc2_weight"] or needs["layer_scale"]
    recompute = above_gelu and not is_kept(post)
    sums = needs["fc2_bias"] or (above_gelu and layer_scale is not None)
    gradients: dict[str, Tensor] = {}
    fc1_weight, fc2_weight, dtype = as_rows(fc1_weight), as_rows(fc2_weight), fc2_weight.dtype
    with no_autocast(x.device):
        if layer_scale is not None:
            layer_scale = layer_scale.contiguous()
        grad, scaled_grad, partial = products.branch_gradient(
            as_rows(grad_y),
            layer_scale,
            path_scale,
            x.shape[1],
            dtype,
            unscaled=above_gelu,
            scaled=below_gelu,
            column_sum=sums,
        )
        if below_gelu:
            grad_pre, gradients["fc1_bias"], recomputed = products.gelu_gradient(
                scaled_grad, fc2_weight, pre, tanh, recompute, column_sum=needs["fc1_bias"]
            )
        elif recompute:
            recomputed = products.gelu(pre, tanh)
        if recompute:
            post = recomputed
            del recomputed

        if above_gelu:
            gradients["fc2_weight"] = products.weight_gradient(grad, post)
            post = post.new_empty(0)  # frees [T, M] where it was recomputed
        if sums:
            column_sum = products.sum_partial(
                partial, fc2_bias.new_empty(fc2_bias.shape, dtype=dtype if layer_scale is None else torch.float32)
            )
            if layer_scale is None:
                gradients["fc2_bias"] = column_sum
            elif above_gelu:
                # the weight gradient before LayerScale gives that of LayerScale too, for which fc2's output is not kept
                gradients["fc2_weight"], gradients["fc2_bias"], gradients["layer_scale"] = (
                    products.layer_scale_gradients(
                        gradients["fc2_weight"], fc2_weight, fc2_bias.contiguous(), layer_scale, column_sum
                    )
                )
            else:
                gradients["fc2_bias"] = (layer_scale * column_sum).to(dtype)
        if needs["fc1_weight"]:
            if not is_kept(normed):
                normed, _, _ = normalise(x, norm_weight, norm_bias, eps, dtype)
            gradients["fc1_weight"] = products.weight_gradient(grad_pre, normed)
        if below_norm:
            grad_normed = products.input_gradient(grad_pre, fc1_weight).view(x.shape)
            gradients["x"], _, _, gradients["norm_weight"], gradients["norm_bias"] = layer_norm_backward(
                grad_y,
                grad_normed,
                x,
                None,
                x.dtype,
                None,
                None,
                norm_weight,
                norm_bias,
                mean,
                rstd,
                learns=needs["norm_weight"] or needs["norm_bias"],
            )
    likes = of_learned(x, norm_weight, norm_bias, fc1_weight, fc2_weight, fc2_bias, layer_scale)
    return tuple(gradients[name] if needs[name] else like.new_empty(0) for name, like in likes.items())


def fake_backward(
    grad_y: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    layer_scale: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    likes = of_learned(x, norm_weight, norm_bias, fc1_weight, fc2_weight, fc2_bias, layer_scale)
    needed = others[-1]
    return tuple(like.new_empty(like.shape if need else 0) for like, need in zip(likes.values(), needed, strict=True))


# inputs that may have a gradient, in the order of the operator's arguments
LEARNED = ("x", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "layer_scale")


def of_learned(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    layer_scale: Tensor | None,
) -> dict[str, Tensor]:
    """A tensor of the shape and dtype of each of `LEARNED`; any for a layer_scale that is None, and has no gradient."""
    fc1_bias, scale = fc1_weight[:, 0], norm_weight if layer_scale is None else layer_scale
    tensors = x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale
    return dict(zip(LEARNED, tensors, strict=True))


def is_kept(tensor: Tensor) -> bool:
    """Whether a matrix was kept for the backward pass: else it is empty, [0]."""
    return tensor.ndim == 2


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, norm_weight, norm_bias, fc1_weight, _, fc2_weight, fc2_bias, layer_scale, path_scale, eps, tanh, *_ = inputs
    ctx.options = eps, tanh
    ctx.save_for_backward(
        x, norm_weight, norm_bias, fc1_weight, fc2_weight, fc2_bias, layer_scale, path_scale, *output[1:]
    )
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_y: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[: len(LEARNED)]
    gradients = layer_norm_mlp_backward_op(grad_y, *ctx.saved_tensors, *ctx.options, needed)
    without = (None,) * 6  # path_scale, and what is no tensor
    return *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), *without


layer_norm_mlp_op = register_op(
    "layer_norm_mlp(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias,"
    " Tensor fc2_weight, Tensor fc2_bias, Tensor? layer_scale, Tensor? path_scale, float eps, bool tanh,"
    " bool keep_normed, bool keep_pre, bool keep_post)"
    " -> (Tensor y, Tensor mean, Tensor rstd, Tensor normed, Tensor pre, Tensor post)",
    launch_forward,
    fake_forward,
)
layer_norm_mlp_backward_op = register_op(
    "layer_norm_mlp_backward(Tensor grad_y, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight,"
    " Tensor fc2_weight, Tensor fc2_bias, Tensor? layer_scale, Tensor? path_scale, Tensor mean, Tensor rstd,"
    " Tensor normed, Tensor pre, Tensor post, float eps, bool tanh, bool[] needed)"
    " -> (Tensor grad_x, Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor grad_fc1_weight, Tensor grad_fc1_bias,"
    " Tensor grad_fc2_weight, Tensor grad_fc2_bias, Tensor grad_layer_scale)",
    launch_backward,
    fake_backward,
)
register_gradient(layer_norm_mlp_op, layer_norm_mlp_backward_op, setup_context, backward)
