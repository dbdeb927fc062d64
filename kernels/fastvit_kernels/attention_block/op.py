"""The public attention half-block, its checks, launches and gradient."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastvit_kernels.attention.launch import Call as AttentionCall
from fastvit_kernels.attention.launch import launch_backward as attention_backward
from fastvit_kernels.attention.launch import launch_backward_and_sums as attention_backward_and_sums
from fastvit_kernels.attention.launch import launch_forward as attention_forward
from fastvit_kernels.attention.op import check_lengths
from fastvit_kernels.attention.tiling import MAX_HEAD_DIM
from fastvit_kernels.attention_block import reference
from fastvit_kernels.checks import check_parameter, check_rate, check_tokens, checked_outputs
from fastvit_kernels.column_sums import ColumnSums
from fastvit_kernels.dispatch import autocast_dtype, uses_triton
from fastvit_kernels.fp8.function import in_fp8
from fastvit_kernels.fp8.op import check_usable
from fastvit_kernels.fp8.products import Layer, handoff_to, layer_of
from fastvit_kernels.fp8.setting import Fp8
from fastvit_kernels.gemm import products
from fastvit_kernels.gemm.products import BranchGradient
from fastvit_kernels.half_block import End, Norm, empty_gradients, needed_gradients
from fastvit_kernels.layer_norm.op import as_rows, normalise
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
    causal: bool = False,
    recompute: Recompute = "none",
    outputs: int | None = None,
    rel_pos_embed: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    fp8: Fp8 | None = None,
) -> Tensor:
    """The attention half of a pre-norm block: x + drop_path(layer_scale * dropout(proj(attention(qkv(norm(x)))))).

    Args:
        x: [B, N, D], any floating dtype; D must be divisible by `heads`.
        norm_weight, norm_bias: [D], the dtype of x or float32.
        qkv_weight, qkv_bias: [3*D, D] and [3*D]; rows are the queries, then keys, then values, each head after head.
        proj_weight, proj_bias: [D, D] and [D]. Both layers have the dtype of x; under autocast any that it casts.
        layer_scale: [D], the dtype of x or float32; None leaves it out.
        dropout: rate on the projected output. Attention probabilities are not dropped, as in Dosovitskiy et al. 2021.
        drop_path: rate at which a sample's whole branch is dropped; kept branches are scaled by 1 / (1 - drop_path).
        causal: a token sees itself and those before it only, as in text towers.
        recompute: what the kernels' backward pass computes again instead of keeping it: nothing, or the normalisation.
            Gradients are the same. No effect on the reference, or with dropout, outputs, rel_pos_embed or
            cu_seqlens, where autograd keeps all.
        outputs: how many tokens of the result are wanted, the first ones; None: all N. Queries, projection and sum are
            computed for these alone, keys and values for all tokens that these see.
        rel_pos_embed: [2*N-1, D/heads], the dtype of the layers: relative positions, see `relative_bias`; not with
            causal.
        cu_seqlens, max_seqlen: the tokens of x, then [1, T, D], are those of S sequences, one after the other, each of
            which attends to itself alone: see `attention`. `outputs` is then of each sequence, none of which may have
            fewer tokens: [1, S * outputs, D]. Not with causal, drop_path or rel_pos_embed.
        fp8: which of "qkv" and "proj" compute their products in FP8, see `fp8_linear`; None: neither.

    Rates are active whenever above 0. Returns [B, N, D], or [B, outputs, D], in the dtype of x, also under autocast,
    which acts as on `torch.nn.functional.linear`: products and attention run in its dtype, the normalisation and the
    sum with x in that of x (float32 if one is float16 and the other bfloat16). Raises ValueError for a wrong shape,
    device, rate, recompute or outputs and TypeError for a wrong dtype.
    """
    check_tokens("x", x)
    width, cast = x.shape[-1], autocast_dtype(x)
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide the width {width} of x, got {heads}")
    check_parameter("norm_weight", norm_weight, [width], like=x, fp32_allowed=True)
    check_parameter("norm_bias", norm_bias, [width], like=x, fp32_allowed=True)
    check_parameter("qkv_weight", qkv_weight, [3 * width, width], like=x, cast_to=cast)
    check_parameter("qkv_bias", qkv_bias, [3 * width], like=x, cast_to=cast)
    check_parameter("proj_weight", proj_weight, [width, width], like=x, cast_to=cast)
    check_parameter("proj_bias", proj_bias, [width], like=x, cast_to=cast)
    if layer_scale is not None:
        check_parameter("layer_scale", layer_scale, [width], like=x, fp32_allowed=True)
    if recompute not in get_args(Recompute):
        raise ValueError(f"recompute must be one of {', '.join(get_args(Recompute))}, got {recompute!r}")
    check_rate("dropout", dropout)
    check_rate("drop_path", drop_path)
    outputs = checked_outputs(outputs, x)
    check_rel_pos_embed(rel_pos_embed, x, heads, causal, cast)
    check_sequences(cu_seqlens, max_seqlen, x, causal=causal, drop_path=drop_path, rel_pos_embed=rel_pos_embed)
    if causal and outputs is not None:  # they see no other
        x, outputs = x[:, :outputs], None
    norm, qkv, proj = (norm_weight, norm_bias), (qkv_weight, qkv_bias), (proj_weight, proj_bias)
    composed = dropout > 0 or outputs is not None or rel_pos_embed is not None or cu_seqlens is not None
    if fp8 is not None:
        check_usable(x, cast or qkv_weight.dtype)
    if composed or width // heads > MAX_HEAD_DIM or not uses_triton("attention_block", x):
        lengths = cu_seqlens, max_seqlen
        layers = *norm, *qkv, *proj, heads, eps, layer_scale
        return reference.attention_block(x, *layers, dropout, drop_path, causal, outputs, rel_pos_embed, *lengths, fp8)
    if cast is not None:
        x = x.to(torch.promote_types(x.dtype, cast))
        qkv_weight, qkv_bias, proj_weight, proj_bias = (tensor.to(cast) for tensor in (*qkv, *proj))
    tensors = x, *norm, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale
    # asked here, since operators run below autograd and cannot know: without a gradient nothing is kept for one
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    keep_normed = keep and recompute == "none" and qkv_weight.requires_grad
    call = Call(*tensors, draw_path_scale(x, drop_path), heads, eps, causal, keep, keep_normed)
    return call_operator(*call[:-1]) if fp8 is None else in_fp8(sys.modules[__name__], fp8, *call[:-1])


def check_rel_pos_embed(
    rel_pos_embed: Tensor | None, x: Tensor, heads: int, causal: bool, cast: torch.dtype | None
) -> None:
    if rel_pos_embed is None:
        return
    check_parameter("rel_pos_embed", rel_pos_embed, [2 * x.shape[1] - 1, x.shape[2] // heads], like=x, cast_to=cast)
    if causal:
        raise ValueError("rel_pos_embed cannot be combined with causal")


def check_sequences(
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    x: Tensor,
    *,
    causal: bool,
    drop_path: float,
    rel_pos_embed: Tensor | None,
) -> None:
    """Raises ValueError or TypeError unless x [1, T, D] can be the tokens of such sequences; None: it is not."""
    check_lengths("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, like=x)
    if cu_seqlens is None:
        return
    if x.shape[0] != 1:
        raise ValueError(f"x must have shape [1, T, D] with cu_seqlens, got {list(x.shape)}")
    others = {"causal": causal, "drop_path": drop_path > 0, "rel_pos_embed": rel_pos_embed is not None}
    for name in (name for name, is_set in others.items() if is_set):
        raise ValueError(f"{name} cannot be combined with cu_seqlens")


# Matrices are [T, D] inside, with T = B * N tokens. Operators cannot return None, so what is not kept for the backward
# pass, and a gradient that nothing needs, is an empty tensor.


class Call(NamedTuple):
    """The arguments of the operator."""

    x: Tensor  # [B, N, D]
    norm_weight: Tensor
    norm_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    layer_scale: Tensor | None
    path_scale: Tensor | None  # [B] float32
    heads: int
    eps: float
    causal: bool
    keep: bool  # all but norm(x)
    keep_normed: bool
    fp8: Fp8 | None = None  # no argument of the operator: with it, the functions here run without one

    def layer(self, name: str, **gradients: bool) -> Layer | None:
        """One of the two layers as FP8 has it; None if it has not. gradients: as `Layer` takes them."""
        return layer_of(self.fp8, name, self.qkv_weight if name == "qkv" else self.proj_weight, **gradients)


ARGUMENTS = (
    "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor qkv_bias, Tensor proj_weight,"
    " Tensor proj_bias, Tensor? layer_scale, Tensor? path_scale, int heads, float eps, bool causal, bool keep,"
    " bool keep_normed"
)
LEARNED = Call._fields[:8]  # inputs that may have a gradient


class Kept(NamedTuple):
    """What the forward pass leaves for the backward pass, besides its arguments."""

    mean: Tensor  # [T] float32, as is rstd
    rstd: Tensor
    normed: Tensor  # [T, D]
    qkv: Tensor  # [B, N, 3, H, d]
    attended: Tensor  # [B, N, D]
    lse: Tensor  # [B, H, N] float32, of attention


KEPT = "Tensor mean, Tensor rstd, Tensor normed, Tensor qkv, Tensor attended, Tensor lse"


def launch_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """y [B, N, D] and what is `Kept`; the arguments are those of `Call`."""
    call = Call(*arguments)
    with no_autocast(call.x.device):
        x = as_rows(call.x)
        kept = forward_before_projection(call, x)
        weight, bias, attended = as_rows(call.proj_weight), call.proj_bias.contiguous(), as_rows(kept.attended)
        scales = None if call.layer_scale is None else call.layer_scale.contiguous(), call.path_scale
        if (proj := call.layer("proj")) is None:
            y = products.linear_residual(attended, weight, bias, x, *scales)
        else:
            y = products.add_residual(proj.forward(attended, None), bias, x, *scales)
    return y.view_as(call.x), *(kept if call.keep else (tensor.new_empty(0) for tensor in kept))


def forward_before_projection(call: Call, x: Tensor) -> Kept:
    """What is kept, for x [T, D]."""
    batch, tokens, width = call.x.shape
    layer, bias = call.layer("qkv"), call.qkv_bias.contiguous()
    handoff, norm = handoff_to(layer, x), (call.norm_weight, call.norm_bias, call.eps)
    _, normed, mean, rstd = normalise(x, *norm, call.qkv_weight.dtype, handoff=handoff)
    if layer is None:
        qkv = products.linear(normed, as_rows(call.qkv_weight), bias)
    else:
        qkv = layer.forward(normed, bias, handoff)
    qkv = qkv.view(batch, tokens, 3, call.heads, width // call.heads)
    attended, lse = attention_forward(*AttentionCall(qkv, causal=call.causal))
    return Kept(mean, rstd, normed if call.keep_normed else normed.new_empty(0), qkv, attended, lse)


def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    (batch, tokens, width), heads, keep = call.x.shape, call.heads, call.keep
    mean, rstd = (call.x.new_empty(batch * tokens if keep else 0, dtype=torch.float32) for _ in range(2))
    normed = call.qkv_weight.new_empty((batch * tokens, width) if call.keep_normed else 0)
    qkv = call.qkv_weight.new_empty((batch, tokens, 3, heads, width // heads) if keep else 0)
    attended = call.qkv_weight.new_empty((batch, tokens, width) if keep else 0)
    lse = call.x.new_empty((batch, heads, tokens) if keep else 0, dtype=torch.float32)
    return call.x.new_empty(call.x.shape), mean, rstd, normed, qkv, attended, lse


def launch_backward(grad_y: Tensor, needed: Sequence[bool], *others: Any) -> tuple[Tensor, ...]:
    """Gradients of `LEARNED`; `needed` says of each whether anything needs it. `others` are Kept and Call."""
    kept, call, sums = Kept(*others[:6]), Call(*others[6:]), ColumnSums()
    needs = dict(zip(LEARNED, needed, strict=True))
    with no_autocast(call.x.device):
        end = end_of(call, needs)
        gradients = half_gradients(as_rows(grad_y), as_rows(call.x), end, call, kept, needs, sums)
        sums.launch()
    if needs["x"]:
        gradients["x"] = gradients["x"].view_as(call.x)
    return needed_gradients([gradients.get(name) for name in LEARNED], needed, call.x)


def end_of(call: Call, needs: Mapping[str, bool]) -> End:
    below_norm = needs["x"] or needs["norm_weight"] or needs["norm_bias"]
    needs_inner = below_norm or needs["qkv_weight"] or needs["qkv_bias"]
    return End(
        as_rows(call.proj_weight),
        call.proj_bias.contiguous(),
        None if call.layer_scale is None else call.layer_scale.contiguous(),
        call.path_scale,
        needs_weight=needs["proj_weight"],
        needs_bias=needs["proj_bias"],
        needs_layer_scale=needs["layer_scale"],
        needs_inner=needs_inner,
        fp8=call.layer(
            "proj",
            learns=needs["proj_weight"] or needs["layer_scale"],
            passes_on=needs_inner,
            one_gradient=call.layer_scale is None,
        ),
    )


def half_gradients(
    grad_y: Tensor,
    x: Tensor,
    end: End,
    call: Call,
    kept: Kept,
    needs: Mapping[str, bool],
    sums: ColumnSums,
    grad: BranchGradient | None = None,
) -> dict[str, Any]:
    """The gradients of what is needed; `grad` is that of the branch, if it is there. `sums` has still to launch.

    grad_y and x are [T, D], as is the gradient of x.
    """
    below_norm = needs["x"] or needs["norm_weight"] or needs["norm_bias"]
    # where LayerNorm's gradient reads grad_y as it is, it also adds up its columns
    sum_in_norm = grad is None and below_norm and end.needs_sum and not end.changes(grad_y)
    if grad is None:
        grad = end.gradient(grad_y, column_sum=end.needs_sum and not sum_in_norm)
    gradients: dict[str, Any] = {}
    gradients["proj_weight"], gradients["proj_bias"], gradients["layer_scale"] = end.parameter_gradients(
        grad, as_rows(kept.attended), sums
    )
    if not end.needs_inner:
        return gradients

    grad_attended = end.input_gradient(grad).view_as(kept.attended)
    attended = grad_attended, kept.qkv, kept.attended, kept.lse
    if needs["qkv_bias"]:
        gradients["qkv_bias"] = call.qkv_bias.new_empty(*call.qkv_bias.shape)
        grad_qkv = attention_backward_and_sums(*attended, gradients["qkv_bias"], sums, call.causal)
    else:
        grad_qkv = attention_backward(*attended, call.causal)
    grad_qkv = grad_qkv.view(-1, call.qkv_weight.shape[0])
    layer = call.layer("qkv", learns=needs["qkv_weight"], passes_on=below_norm)
    if needs["qkv_weight"]:
        normed = kept.normed
        if normed.ndim != 2:
            normed = normalise(x, call.norm_weight, call.norm_bias, call.eps, grad_qkv.dtype)[1]
        if layer is None:
            gradients["qkv_weight"] = products.weight_gradient(grad_qkv, normed)
        else:
            gradients["qkv_weight"] = layer.weight_gradient(grad_qkv, normed)
    if not below_norm:
        return gradients

    if layer is None:
        grad_normed = products.input_gradient(grad_qkv, as_rows(call.qkv_weight))
    else:
        grad_normed = layer.input_gradient(grad_qkv)
    norm = Norm(x, call.norm_weight, call.norm_bias, kept.mean, kept.rstd, needs["norm_weight"], needs["norm_bias"])
    if sum_in_norm:
        gradients["proj_bias"] = torch.empty_like(end.bias)
    gradients["x"], gradients["norm_weight"], gradients["norm_bias"], _ = norm.gradients(
        grad_y, grad_normed, sums, grad_y_sum=gradients["proj_bias"] if sum_in_norm else None
    )
    return gradients


def fake_backward(grad_y: Tensor, needed: Sequence[bool], *others: Any) -> tuple[Tensor, ...]:
    return empty_gradients(Call(*others[6:])[: len(LEARNED)], needed)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = Call(*inputs)
    ctx.save_for_backward(*output[1:], *call[:9])
    ctx.options = inputs[9:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_y: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[: len(LEARNED)]
    gradients = attention_block_backward_op(grad_y, needed, *ctx.saved_tensors, *ctx.options)
    without = (None,) * (len(Call._fields) - 1 - len(LEARNED))
    return *(g if need else None for g, need in zip(gradients, needed, strict=True)), *without


attention_block_op = register_op(f"attention_block({ARGUMENTS}) -> (Tensor y, {KEPT})", launch_forward, fake_forward)
attention_block_backward_op = register_op(
    f"attention_block_backward(Tensor grad_y, bool[] needed, {KEPT}, {ARGUMENTS})"
    f" -> ({', '.join(f'Tensor grad_{name}' for name in LEARNED)})",
    launch_backward,
    fake_backward,
)
call_operator = register_gradient(attention_block_op, attention_block_backward_op, setup_context, backward)
