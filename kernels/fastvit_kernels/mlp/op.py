"""The public MLP half-block, its checks, launches and gradient."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastvit_kernels.checks import check_parameter, check_rate, check_tokens
from fastvit_kernels.column_sums import ColumnSums
from fastvit_kernels.dispatch import autocast_dtype, uses_triton
from fastvit_kernels.fp8.function import in_fp8
from fastvit_kernels.fp8.op import check_usable
from fastvit_kernels.fp8.passes import gelu
from fastvit_kernels.fp8.products import Layer, handoff_to, layer_of
from fastvit_kernels.fp8.setting import Fp8
from fastvit_kernels.fp8_scales.handoff import Handoff, Maxima
from fastvit_kernels.gemm import products
from fastvit_kernels.gemm.products import BranchGradient
from fastvit_kernels.half_block import End, Norm, empty_gradients, needed_gradients
from fastvit_kernels.layer_norm.op import as_rows, normalise
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
    fp8: Fp8 | None = None,
) -> Tensor:
    """The MLP half of a pre-norm block: x + drop_path(layer_scale * dropout(fc2(dropout(act(fc1(norm(x))))))).

    Args:
        x: [B, N, D], any floating dtype.
        norm_weight, norm_bias: [D], the dtype of x or float32.
        fc1_weight, fc1_bias: [M, D] and [M], for any hidden width M, the dtype of x; under autocast any that it casts.
        fc2_weight, fc2_bias: [D, M] and [D], likewise.
        activation: "gelu" is the exact erf form, "gelu_tanh" the tanh form (Hendrycks and Gimpel 2016).
        layer_scale: [D], the dtype of x or float32; None leaves it out.
        dropout: rate on the activations and, drawn apart, on the output (Dosovitskiy et al. 2021, appendix B.1).
        drop_path: rate at which a sample's whole branch is dropped; kept branches are scaled by 1 / (1 - drop_path).
        recompute: what the kernels' backward pass computes again instead of keeping it: nothing, the GELU, or the
            normalisation too. Gradients are the same. What no gradient will need, as under `torch.no_grad` or with
            frozen parameters, is never kept. No effect on the reference, or with dropout, where autograd decides.
        fp8: which of "fc1" and "fc2" compute their products in FP8, see `fp8_linear`; None: neither.

    Rates are active whenever above 0. Returns [B, N, D] in the dtype of x, also under autocast, which acts as on
    `torch.nn.functional.linear`: products run in its dtype, the normalisation and the sum with x in that of x (float32
    if one is float16 and the other bfloat16). Raises
    ValueError for a wrong shape, device, rate, activation or recompute and TypeError for a wrong dtype.
    """
    check_tokens("x", x)
    width, hidden, cast = x.shape[-1], fc1_weight.shape[0], autocast_dtype(x)
    check_parameter("norm_weight", norm_weight, [width], like=x, fp32_allowed=True)
    check_parameter("norm_bias", norm_bias, [width], like=x, fp32_allowed=True)
    check_parameter("fc1_weight", fc1_weight, [hidden, width], like=x, cast_to=cast)
    check_parameter("fc1_bias", fc1_bias, [hidden], like=x, cast_to=cast)
    check_parameter("fc2_weight", fc2_weight, [width, hidden], like=x, cast_to=cast)
    check_parameter("fc2_bias", fc2_bias, [width], like=x, cast_to=cast)
    if layer_scale is not None:
        check_parameter("layer_scale", layer_scale, [width], like=x, fp32_allowed=True)
    if activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
    if recompute not in get_args(Recompute):
        raise ValueError(f"recompute must be one of {', '.join(get_args(Recompute))}, got {recompute!r}")
    check_rate("dropout", dropout)
    check_rate("drop_path", drop_path)
    norm, fc1, fc2 = (norm_weight, norm_bias), (fc1_weight, fc1_bias), (fc2_weight, fc2_bias)
    if fp8 is not None:
        check_usable(x, cast or fc1_weight.dtype)
    if dropout > 0 or not uses_triton("mlp", x):
        return reference.layer_norm_mlp(x, *norm, *fc1, *fc2, eps, activation, layer_scale, dropout, drop_path, fp8)
    if cast is not None:
        x = x.to(torch.promote_types(x.dtype, cast))
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = (t.to(cast) for t in (*fc1, *fc2))
    tensors = x, *norm, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale
    keep = kept_for(recompute, *(tensor is not None and tensor.requires_grad for tensor in tensors))
    call = Call(*tensors, draw_path_scale(x, drop_path), eps, activation == "gelu_tanh", *keep)
    return call_operator(*call[:-1]) if fp8 is None else in_fp8(sys.modules[__name__], fp8, *call[:-1])


# Matrices are [T, D] and [T, M] inside, with T = B * N tokens. Operators cannot return None, so what is not kept for
# the backward pass, and a gradient that is not needed, is an empty tensor [0].


class Call(NamedTuple):
    """The arguments of the operator."""

    x: Tensor  # [B, N, D]
    norm_weight: Tensor
    norm_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    layer_scale: Tensor | None
    path_scale: Tensor | None  # [B] float32
    eps: float
    tanh: bool
    keep_normed: bool
    keep_pre: bool
    keep_post: bool
    fp8: Fp8 | None = None  # no argument of the operator: with it, the functions here run without one

    def layer(self, name: str, **gradients: bool) -> Layer | None:
        """One of the two layers as FP8 has it; None if it has not. gradients: as `Layer` takes them."""
        return layer_of(self.fp8, name, self.fc1_weight if name == "fc1" else self.fc2_weight, **gradients)


ARGUMENTS = (
    "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight,"
    " Tensor fc2_bias, Tensor? layer_scale, Tensor? path_scale, float eps, bool tanh, bool keep_normed, bool keep_pre,"
    " bool keep_post"
)
LEARNED = Call._fields[:8]  # inputs that may have a gradient


class Kept(NamedTuple):
    """What the forward pass leaves for the backward pass, besides its arguments."""

    mean: Tensor  # [T] float32, as is rstd
    rstd: Tensor
    normed: Tensor  # [T, D]
    pre: Tensor  # [T, M], GELU's input
    post: Tensor  # [T, M], its output


KEPT = "Tensor mean, Tensor rstd, Tensor normed, Tensor pre, Tensor post"


def kept_for(
    recompute: Recompute,
    x: bool,
    norm_weight: bool,
    norm_bias: bool,
    fc1_weight: bool,
    fc1_bias: bool,
    fc2_weight: bool,
    fc2_bias: bool,
    layer_scale: bool,
) -> tuple[bool, bool, bool]:
    """Whether norm(x), GELU's input and its output are kept, given which inputs require a gradient.

    The backward pass reads norm(x) for W_1, GELU's input for all below it, and its output for all above.
    """
    if not torch.is_grad_enabled():
        return False, False, False
    below_gelu = x or norm_weight or norm_bias or fc1_weight or fc1_bias
    above_gelu = fc2_weight or layer_scale
    keep_post = above_gelu and recompute == "none"
    return fc1_weight and recompute != "all", below_gelu or (above_gelu and not keep_post), keep_post


def launch_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """y [B, N, D] and what is `Kept`; the arguments are those of `Call`."""
    call = Call(*arguments)
    with no_autocast(call.x.device):
        x, dtype = as_rows(call.x), call.fc1_weight.dtype
        handoff = handoff_to(call.layer("fc1"), x)
        _, normed, mean, rstd = normalise(x, call.norm_weight, call.norm_bias, call.eps, dtype, handoff=handoff)
        y, *kept = forward_after_norm(call, x, normed, handoff)
    return y.view(call.x.shape), mean, rstd, *kept


def forward_after_norm(
    call: Call, x: Tensor, normed: Tensor, handoff: Handoff
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and norm(x), GELU's input and its output as far as they are kept; all matrices of T rows, as x and norm(x).

    handoff: what the normalisation has left for a product in FP8.
    """
    fc1_weight, fc1_bias = as_rows(call.fc1_weight), call.fc1_bias.contiguous()
    fc2_weight, fc2_bias = as_rows(call.fc2_weight), call.fc2_bias.contiguous()
    scales = None if call.layer_scale is None else call.layer_scale.contiguous(), call.path_scale
    fc1, fc2 = call.layer("fc1"), call.layer("fc2")
    if fc1 is None and fc2 is None:
        pre, post = products.linear_gelu(normed, fc1_weight, fc1_bias, call.tanh, call.keep_pre)
        y = products.linear_residual(post, fc2_weight, fc2_bias, x, *scales)
    else:
        pre = products.linear(normed, fc1_weight, fc1_bias) if fc1 is None else fc1.forward(normed, fc1_bias, handoff)
        to_fc2 = handoff_to(fc2, pre)
        post = products.gelu(pre, call.tanh) if fc2 is None else gelu(pre, call.tanh, to_fc2, keep=call.keep_post)
        if not call.keep_pre:
            pre = pre.new_empty(0)
        if fc2 is None:
            y = products.linear_residual(post, fc2_weight, fc2_bias, x, *scales)
        else:
            y = products.add_residual(fc2.forward(post, None, to_fc2), fc2_bias, x, *scales)
    if not call.keep_normed:
        normed = normed.new_empty(0)
    return y, normed, pre, post if call.keep_post else post.new_empty(0)


def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    x, weight, tokens = call.x, call.fc1_weight, call.x.shape[0] * call.x.shape[1]
    hidden, width = weight.shape
    mean, rstd = (x.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    normed = weight.new_empty((tokens, width) if call.keep_normed else 0)
    pre, post = (weight.new_empty((tokens, hidden) if keep else 0) for keep in (call.keep_pre, call.keep_post))
    return x.new_empty(x.shape), mean, rstd, normed, pre, post


def launch_backward(grad_y: Tensor, needed: Sequence[bool], *others: Any) -> tuple[Tensor, ...]:
    """Gradients of `LEARNED`; `needed` says of each whether anything needs it. `others` are Kept and Call."""
    kept, call, sums = Kept(*others[:5]), Call(*others[5:]), ColumnSums()
    needs = dict(zip(LEARNED, needed, strict=True))
    with no_autocast(call.x.device):
        gradients, _ = half_gradients(as_rows(grad_y), as_rows(call.x), call, kept, needs, sums)
        sums.launch()
    if needs["x"]:
        gradients["x"] = gradients["x"].view(call.x.shape)
    return needed_gradients([gradients.get(name) for name in LEARNED], needed, call.x)


def half_gradients(
    grad_y: Tensor,
    x: Tensor,
    call: Call,
    kept: Kept,
    needs: Mapping[str, bool],
    sums: ColumnSums,
    before: End | None = None,
) -> tuple[dict[str, Any], BranchGradient | None]:
    """The gradients of what is needed, and of the branch before, if its `End` is given. `sums` has still to launch.

    grad_y and x are [T, D], as is the gradient of x.
    """
    below_norm = needs["x"] or needs["norm_weight"] or needs["norm_bias"]
    below_gelu = below_norm or needs["fc1_weight"] or needs["fc1_bias"]
    end = End(
        as_rows(call.fc2_weight),
        call.fc2_bias.contiguous(),
        None if call.layer_scale is None else call.layer_scale.contiguous(),
        call.path_scale,
        needs_weight=needs["fc2_weight"],
        needs_bias=needs["fc2_bias"],
        needs_layer_scale=needs["layer_scale"],
        needs_inner=below_gelu,
        fp8=call.layer(
            "fc2",
            learns=needs["fc2_weight"] or needs["layer_scale"],
            passes_on=below_gelu,
            one_gradient=call.layer_scale is None,
        ),
    )
    fc1 = call.layer("fc1", learns=needs["fc1_weight"], passes_on=below_norm)
    maxima = None if fc1 is None else fc1.gradient_maxima(kept.pre)
    gradients: dict[str, Any] = {}
    # where LayerNorm's gradient reads grad_y as it is, it also adds up its columns
    sum_in_norm = below_norm and end.needs_sum and not end.changes(grad_y)
    grad = end.gradient(grad_y, column_sum=end.needs_sum and not sum_in_norm)

    post = kept.post
    recompute = end.needs_product and not is_kept(post)
    if below_gelu:
        grad_pre, partial, recomputed = gelu_gradient(end, grad, kept.pre, call.tanh, recompute, needs, maxima)
        if needs["fc1_bias"]:
            gradients["fc1_bias"] = torch.empty_like(call.fc1_bias)
            sums.add(partial, gradients["fc1_bias"])
    elif recompute:
        recomputed = products.gelu(kept.pre, call.tanh)
    if recompute:
        post = recomputed
        del recomputed
    gradients["fc2_weight"], gradients["fc2_bias"], gradients["layer_scale"] = end.parameter_gradients(grad, post, sums)
    del post  # [T, M], where it was recomputed
    if needs["fc1_weight"]:
        normed = kept.normed
        if not is_kept(normed):
            normed = normalise(x, call.norm_weight, call.norm_bias, call.eps, grad_pre.dtype)[1]
        if fc1 is None:
            gradients["fc1_weight"] = products.weight_gradient(grad_pre, normed)
        else:
            gradients["fc1_weight"] = fc1.weight_gradient(grad_pre, normed, maxima=maxima)
    if not below_norm:
        return gradients, None

    if fc1 is None:
        grad_normed = products.input_gradient(grad_pre, as_rows(call.fc1_weight))
    else:
        grad_normed = fc1.input_gradient(grad_pre, maxima=maxima)
    norm = Norm(x, call.norm_weight, call.norm_bias, kept.mean, kept.rstd, needs["norm_weight"], needs["norm_bias"])
    if sum_in_norm:
        gradients["fc2_bias"] = torch.empty_like(end.bias)
    gradients["x"], gradients["norm_weight"], gradients["norm_bias"], branch = norm.gradients(
        grad_y, grad_normed, sums, grad_y_sum=gradients["fc2_bias"] if sum_in_norm else None, before=before
    )
    return gradients, branch


def gelu_gradient(
    end: End,
    grad: BranchGradient,
    pre: Tensor,
    tanh: bool,
    recompute: bool,
    needs: Mapping[str, bool],
    maxima: Maxima | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `products.gelu_gradient`, by fc2's own product; maxima: of the gradient of GELU's input, for that of fc1."""
    column_sum = needs["fc1_bias"]
    if end.fp8 is None and maxima is None:
        return products.gelu_gradient(grad.scaled, end.weight, pre, tanh, recompute, column_sum)
    grad_pre, post = end.input_gradient(grad), torch.empty_like(pre) if recompute else None
    partial = products.scale_gradient(
        grad_pre, grad_pre, pre=pre, post=post, tanh=tanh, column_sum=column_sum, maxima=maxima
    )
    return grad_pre, partial, pre.new_empty(0) if post is None else post


def fake_backward(grad_y: Tensor, needed: Sequence[bool], *others: Any) -> tuple[Tensor, ...]:
    return empty_gradients(Call(*others[5:])[: len(LEARNED)], needed)


def is_kept(tensor: Tensor) -> bool:
    """Whether a matrix was kept for the backward pass: else it is empty, [0]."""
    return tensor.ndim == 2


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = Call(*inputs)
    ctx.save_for_backward(*output[1:], *call[:9])
    ctx.options = inputs[9:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_y: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[: len(LEARNED)]
    gradients = layer_norm_mlp_backward_op(grad_y, needed, *ctx.saved_tensors, *ctx.options)
    without = (None,) * 6  # path_scale, and what is no tensor
    return *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), *without


layer_norm_mlp_op = register_op(f"layer_norm_mlp({ARGUMENTS}) -> (Tensor y, {KEPT})", launch_forward, fake_forward)
layer_norm_mlp_backward_op = register_op(
    f"layer_norm_mlp_backward(Tensor grad_y, bool[] needed, {KEPT}, {ARGUMENTS})"
    f" -> ({', '.join(f'Tensor grad_{name}' for name in LEARNED)})",
    launch_backward,
    fake_backward,
)
call_operator = register_gradient(layer_norm_mlp_op, layer_norm_mlp_backward_op, setup_context, backward)
