"""The public attention half-block, its checks, launches and gradient."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastvit_kernels.attention.launch import launch_backward as attention_backward
from fastvit_kernels.attention.launch import launch_forward as attention_forward
from fastvit_kernels.attention.tiling import MAX_HEAD_DIM
from fastvit_kernels.attention_block import reference
from fastvit_kernels.checks import check_parameter, check_rate, check_tokens
from fastvit_kernels.dispatch import uses_triton
from fastvit_kernels.gemm import products
from fastvit_kernels.layer_norm.op import as_rows, normalise
from fastvit_kernels.layer_norm.op import launch_backward as layer_norm_backward
from fastvit_kernels.registration import no_autocast, register_gradient, register_op
from fastvit_kernels.residual import draw_path_scale

Recompute = Literal["none", "norm"]


def attention_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    *,
    heads: int,
    eps: float,
    layer_scale: Tensor | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    recompute: Recompute = "none",
    outputs: int | None = None,
) -> Tensor:
    """The attention half of a pre-norm block: x + drop_path(layer_scale * dropout(proj(attention(qkv(norm(x)))))).

    Args:
        x: [B, N, D], any floating dtype; D must be divisible by `heads`.
        norm_weight, norm_bias: [D], the dtype of x or float32.
        qkv_weight, qkv_bias: [3*D, D] and [3*D]; rows are the queries, then keys, then values, each head after head.
        proj_weight, proj_bias: [D, D] and [D].
        layer_scale: [D], the dtype of x or float32; None leaves it out.
        dropout: rate on the projected output. Attention probabilities are not dropped, as in Dosovitskiy et al. 2021.
        drop_path: rate at which a sample's whole branch is dropped; kept branches are scaled by 1 / (1 - drop_path).
        recompute: what the kernels' backward pass computes again instead of keeping it: nothing, or the normalisation.
            Gradients are the same. No effect on the reference, or with dropout or `outputs`, where autograd keeps all.
        outputs: how many tokens of the result are wanted, the first ones; None: all N. Queries, projection and sum are
            computed for these alone, keys and values for all tokens.

    Rates are active whenever above 0. Returns [B, N, D], or [B, outputs, D], in the dtype of x, also under autocast, which acts as on
    `torch.nn.functional.linear`: products and attention run in its dtype, the normalisation and the sum with x in that
    of x. Raises ValueError for a wrong shape, device, rate or recompute and TypeError for a wrong dtype.
    """
    check_tokens("x", x)
    width = x.shape[-1]
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide the width {width} of x, got {heads}")
    check_parameter("norm_weight", norm_weight, [width], like=x, fp32_allowed=True)
    check_parameter("norm_bias", norm_bias, [width], like=x, fp32_allowed=True)
    check_parameter("qkv_weight", qkv_weight, [3 * width, width], like=x)
    check_parameter("qkv_bias", qkv_bias, [3 * width], like=x)
    check_parameter("proj_weight", proj_weight, [width, width], like=x)
    check_parameter("proj_bias", proj_bias, [width], like=x)
    if layer_scale is not None:
        check_parameter("layer_scale", layer_scale, [width], like=x, fp32_allowed=True)
    if recompute not in get_args(Recompute):
        raise ValueError(f"recompute must be one of {', '.join(get_args(Recompute))}, got {recompute!r}")
    check_rate("dropout", dropout)
    check_rate("drop_path", drop_path)
    outputs = checked_outputs(outputs, x)
    norm, qkv, proj = (norm_weight, norm_bias), (qkv_weight, qkv_bias), (proj_weight, proj_bias)
    composed = dropout > 0 or outputs is not None
    if composed or width // heads > MAX_HEAD_DIM or not uses_triton("attention_block", x):
        return reference.attention_block(x, *norm, *qkv, *proj, heads, eps, layer_scale, dropout, drop_path, outputs)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(torch.promote_types(x.dtype, dtype))
        qkv_weight, qkv_bias, proj_weight, proj_bias = (tensor.to(dtype) for tensor in (*qkv, *proj))
    tensors = x, *norm, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale
    # asked here, since operators run below autograd and cannot know: without a gradient nothing is kept for one
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    keep_normed = keep and recompute == "none" and qkv_weight.requires_grad
    return attention_block_op(*tensors, draw_path_scale(x, drop_path), heads, eps, keep, keep_normed)[0]


def checked_outputs(outputs: int | None, x: Tensor) -> int | None:
    """None if the result has all tokens of x [B, N, D]."""
    if outputs is not None and not 1 <= outputs <= x.shape[1]:
        raise ValueError(f"outputs must be at least 1 and at most the {x.shape[1]} tokens of x, got {outputs}")
    return None if outputs == x.shape[1] else outputs


# Matrices are [T, D] inside, with T = B * N tokens. Operators cannot return None, so what is not kept for the backward
# pass, and a gradient that nothing needs, is an empty tensor.


def launch_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    heads: int,
    eps: float,
    keep: bool,
    keep_normed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, width = x.shape
    with no_autocast(x.device):
        if products.norm_in_epilogue("norm plain", x, qkv_weight):
            normed = qkv_weight.new_empty(0)
            mean, rstd = products.row_statistics(as_rows(x), eps)
            norm = norm_weight.contiguous(), norm_bias.contiguous()
            qkv = products.norm_linear(as_rows(x), mean, rstd, *norm, as_rows(qkv_weight), qkv_bias.contiguous())
        else:
            normed, mean, rstd = normalise(x, norm_weight, norm_bias, eps, qkv_weight.dtype)
            qkv = products.linear(normed, as_rows(qkv_weight), qkv_bias.contiguous())
        if not keep_normed:
            normed = normed.new_empty(0)
        qkv = qkv.view(batch, tokens, 3, heads, width // heads)
        attended, lse = attention_forward(qkv)
        y = products.linear_residual(
            as_rows(attended),
            as_rows(proj_weight),
            proj_bias.contiguous(),
            as_rows(x),
            None if layer_scale is None else layer_scale.contiguous(),
            path_scale,
            rows_per_sample=tokens,
        )
    if not keep:
        mean, rstd, qkv, attended, lse = (tensor.new_empty(0) for tensor in (mean, rstd, qkv, attended, lse))
    return y.view(x.shape), mean, rstd, normed, qkv, attended, lse


def fake_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    heads: int,
    eps: float,
    keep: bool,
    keep_normed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, width = x.shape
    keep_normed = keep_normed and not products.norm_in_epilogue("norm plain", x, qkv_weight)
    y = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(batch * tokens if keep else 0, dtype=torch.float32) for _ in range(2))
    normed = qkv_weight.new_empty((batch * tokens, width) if keep_normed else 0)
    qkv = qkv_weight.new_empty((batch, tokens, 3, heads, width // heads) if keep else 0)
    attended = qkv_weight.new_empty((batch, tokens, width) if keep else 0)
    lse = x.new_empty((batch, heads, tokens) if keep else 0, dtype=torch.float32)
    return y, mean, rstd, normed, qkv, attended, lse


def launch_backward(
    grad_y: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    layer_scale: Tensor | None,
    path_scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    normed: Tensor | None,
    qkv: Tensor,
    attended: Tensor,
    lse: Tensor,
    eps: float,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of `LEARNED`; `needed` says of each whether anything needs it, others are empty."""
    needs = dict(zip(LEARNED, needed, strict=True))
    below_norm = needs["x"] or needs["norm_weight"] or needs["norm_bias"]
    below_attention = below_norm or needs["qkv_weight"] or needs["qkv_bias"]
    above_attention = needs["proj_weight"] or needs["layer_scale"]
    gradients: dict[str, Tensor] = {}
    qkv_weight, proj_weight, dtype = as_rows(qkv_weight), as_rows(proj_weight), qkv_weight.dtype
    with no_autocast(x.device):
        if layer_scale is not None:
            layer_scale = layer_scale.contiguous()
        grad, scaled_grad, partial = products.branch_gradient(
            as_rows(grad_y), layer_scale, path_scale, x.shape[1], dtype
        )
        if above_attention:
            gradients["proj_weight"] = products.weight_gradient(grad, as_rows(attended))
        if layer_scale is None:
            if needs["proj_bias"]:
                gradients["proj_bias"] = products.sum_partial(partial, proj_bias.new_empty(proj_bias.shape))
        elif above_attention or needs["proj_bias"]:
            column_sums = products.sum_partial(partial, x.new_empty(x.shape[-1], dtype=torch.float32))
            if above_attention:
                # the weight gradient before LayerScale gives that of LayerScale too: the branch is not kept for it
                gradients["proj_weight"], gradients["proj_bias"], gradients["layer_scale"] = (
                    products.layer_scale_gradients(
                        gradients["proj_weight"], proj_weight, proj_bias.contiguous(), layer_scale, column_sums
                    )
                )
            else:
                gradients["proj_bias"] = (layer_scale * column_sums).to(dtype)
        if below_attention:
            grad_attended = products.input_gradient(scaled_grad, proj_weight).view(attended.shape)
            grad_qkv = attention_backward(grad_attended, qkv, attended, lse).view(-1, len(qkv_weight))  # [T, 3 * D]
        if needs["qkv_bias"]:
            partial = products.scale_gradient(grad_qkv, None)
            gradients["qkv_bias"] = products.sum_partial(partial, grad_qkv.new_empty(len(qkv_weight)))
        if needs["qkv_weight"]:
            if normed is None:
                normed, _, _ = normalise(x, norm_weight, norm_bias, eps, dtype)
            gradients["qkv_weight"] = products.weight_gradient(grad_qkv, normed)
        if below_norm:
            grad_normed = products.input_gradient(grad_qkv, qkv_weight).view(x.shape)
            gradients["x"], _, _, gradients["norm_weight"], gradients["norm_bias"] = layer_norm_backward(
                grad_y, grad_normed, x, None, x.dtype, None, None, norm_weight, norm_bias, mean, rstd
            )
    return tuple(gradients[name] if needs[name] else x.new_empty(0) for name in LEARNED)


# inputs that may have a gradient, in the order of the operator's arguments
LEARNED = ("x", "norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "layer_scale")


def fake_backward(
    grad_y: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    layer_scale: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    likes = x, norm_weight, norm_bias, qkv_weight, qkv_weight[:, 0], proj_weight, proj_bias, layer_scale
    needed = others[-1]
    return tuple(
        like.new_empty(like.shape) if like is not None and need else x.new_empty(0)
        for like, need in zip(likes, needed, strict=True)
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        x,
        norm_weight,
        norm_bias,
        qkv_weight,
        _,
        proj_weight,
        proj_bias,
        layer_scale,
        path_scale,
        _,
        eps,
        _,
        keep_normed,
    ) = inputs
    _, mean, rstd, normed, *attention = output
    keep_normed = keep_normed and not products.norm_in_epilogue("norm plain", x, qkv_weight)
    ctx.eps = eps
    parameters = norm_weight, norm_bias, qkv_weight, proj_weight, proj_bias, layer_scale, path_scale
    ctx.save_for_backward(x, *parameters, mean, rstd, normed if keep_normed else None, *attention)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_y: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[: len(LEARNED)]
    gradients = attention_block_backward_op(grad_y, *ctx.saved_tensors, ctx.eps, needed)
    return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None, None, None, None


attention_block_op = register_op(
    "attention_block(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor qkv_bias,"
    " Tensor proj_weight, Tensor proj_bias, Tensor? layer_scale, Tensor? path_scale, int heads, float eps, bool keep,"
    " bool keep_normed)"
    " -> (Tensor y, Tensor mean, Tensor rstd, Tensor normed, Tensor qkv, Tensor attended, Tensor lse)",
    launch_forward,
    fake_forward,
)
attention_block_backward_op = register_op(
    "attention_block_backward(Tensor grad_y, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight,"
    " Tensor proj_weight, Tensor proj_bias, Tensor? layer_scale, Tensor? path_scale, Tensor mean, Tensor rstd,"
    " Tensor? normed, Tensor qkv, Tensor attended, Tensor lse, float eps, bool[] needed)"
    " -> (Tensor grad_x, Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor grad_qkv_weight, Tensor grad_qkv_bias,"
    " Tensor grad_proj_weight, Tensor grad_proj_bias, Tensor grad_layer_scale)",
    launch_backward,
    fake_backward,
)
register_gradient(attention_block_op, attention_block_backward_op, setup_context, backward)
