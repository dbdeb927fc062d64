"""The public Transformer block, its checks, launches and gradient."""

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from fastvit_kernels.attention.op import MAX_HEAD_DIM
from fastvit_kernels.attention_block import op as attention_half
from fastvit_kernels.block import reference
from fastvit_kernels.checks import check_parameter, check_rate, check_tokens, checked_outputs
from fastvit_kernels.column_sums import ColumnSums
from fastvit_kernels.dispatch import autocast_dtype, uses_triton
from fastvit_kernels.fp8.function import in_fp8
from fastvit_kernels.fp8.op import check_usable
from fastvit_kernels.fp8.products import handoff_to
from fastvit_kernels.fp8.setting import Fp8
from fastvit_kernels.fp8_scales.handoff import Handoff
from fastvit_kernels.gemm import products
from fastvit_kernels.half_block import empty_gradients, needed_gradients
from fastvit_kernels.layer_norm.op import as_rows, normalise
from fastvit_kernels.mlp import op as mlp_half
from fastvit_kernels.mlp.op import Activation, Recompute
from fastvit_kernels.registration import no_autocast, register_gradient, register_op
from fastvit_kernels.residual import draw_path_scale

ACTIVATIONS, RECOMPUTE = get_args(Activation), get_args(Recompute)


def transformer_block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    heads: int,
    eps: float,
    activation: Activation = "gelu",
    layer_scale1: Tensor | None = None,
    layer_scale2: Tensor | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    causal: bool = False,
    recompute: Recompute = "gelu",
    outputs: int | None = None,
    rel_pos_embed: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    fp8: Fp8 | None = None,
) -> Tensor:
    """A pre-norm block: `attention_block`, then `layer_norm_mlp` (Dosovitskiy et al. 2021), as one operator.

    Args:
        x: [B, N, D], any floating dtype; D must be divisible by `heads`.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: [D], the dtype of x or float32.
        qkv_weight, qkv_bias: [3*D, D] and [3*D]; rows are the queries, then keys, then values, each head after head.
        proj_weight, proj_bias: [D, D] and [D].
        fc1_weight, fc1_bias: [M, D] and [M], for any hidden width M.
        fc2_weight, fc2_bias: [D, M] and [D]. All layers have the dtype of x; under autocast any that it casts.
        eps: added to the variance by both normalisations.
        activation: "gelu" is the exact erf form, "gelu_tanh" the tanh form (Hendrycks and Gimpel 2016).
        layer_scale1, layer_scale2: [D], the dtype of x or float32; None leaves it out.
        dropout: rate on the projected attention, on the activations and on the output of the MLP.
        drop_path: rate at which the branch of a sample is dropped, drawn for each half; kept branches are scaled by
            1 / (1 - drop_path).
        causal: a token sees itself and those before it only, as in text towers.
        recompute: what the backward pass computes again instead of keeping it: nothing ("none"), the GELU, or both
            normalisations too ("all"). Gradients are the same. No effect on the reference.
        outputs: how many tokens of the result are wanted, the first ones; None: all N. Only keys, values and the
            normalisation before them are then computed for all tokens.
        rel_pos_embed: [2*N-1, D/heads]: relative positions, see `attention_block`.
        cu_seqlens, max_seqlen: x is [1, T, D], the tokens of sequences of different lengths, see `attention_block`.
        fp8: which layers compute their products in FP8, see `fp8_linear`; None: none.

    Rates are active whenever above 0; a dropout above 0, `outputs`, `rel_pos_embed` or `cu_seqlens` runs the two
    halves, one after the other.
    Returns [B, N, D], or [B, outputs, D], in the dtype of x, also under autocast, which acts as on
    `torch.nn.functional.linear`: products and attention run in its dtype, normalisations and sums with x in that of x
    (float32 if one is float16 and the other bfloat16).
    Raises ValueError for a wrong shape, device, rate, choice or number and TypeError for a wrong dtype.
    """
    check_tokens("x", x)
    norm1, norm2 = (norm1_weight, norm1_bias), (norm2_weight, norm2_bias)
    first, second = [qkv_weight, qkv_bias, proj_weight, proj_bias], [fc1_weight, fc1_bias, fc2_weight, fc2_bias]
    parameters = *norm1, *first, layer_scale1, *norm2, *second, layer_scale2
    cast = autocast_dtype(x)
    looks = [None if t is None else (t.shape, t.dtype, t.device) for t in (x, *parameters)]
    # as good as always the same, and not a matter of the values, so what has been checked once need not be again
    check = check_parameters.__wrapped__ if torch.compiler.is_compiling() else check_parameters
    check(heads, cast, *looks)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    check_rate("dropout", dropout)
    check_rate("drop_path", drop_path)
    outputs = checked_outputs(outputs, x)
    attention_half.check_rel_pos_embed(rel_pos_embed, x, heads, causal, cast)
    attention_half.check_sequences(
        cu_seqlens, max_seqlen, x, causal=causal, drop_path=drop_path, rel_pos_embed=rel_pos_embed
    )
    if causal and outputs is not None:  # they see no other
        x, outputs = x[:, :outputs], None
    if fp8 is not None:
        check_usable(x, cast or fc1_weight.dtype)
    composed = dropout > 0 or outputs is not None or rel_pos_embed is not None or cu_seqlens is not None
    if composed or x.shape[-1] // heads > MAX_HEAD_DIM or not uses_triton("block", x):
        return reference.transformer_block(
            x,
            *parameters,
            heads=heads,
            eps=eps,
            activation=activation,
            dropout=dropout,
            drop_path=drop_path,
            causal=causal,
            recompute=recompute,
            outputs=outputs,
            rel_pos_embed=rel_pos_embed,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            fp8=fp8,
        )
    if cast is not None:
        x = x.to(torch.promote_types(x.dtype, cast))
        first, second = ([tensor.to(cast) for tensor in tensors] for tensors in (first, second))
    tensors = x, *norm1, *first, layer_scale1, *norm2, *second, layer_scale2
    keep = kept_for(recompute, [tensor is not None and tensor.requires_grad for tensor in tensors])
    path_scales = draw_path_scale(x, drop_path), draw_path_scale(x, drop_path)
    call = *tensors, *path_scales, heads, eps, activation == "gelu_tanh", causal, *keep
    return call_operator(*call) if fp8 is None else in_fp8(sys.modules[__name__], fp8, *call)


class Look(NamedTuple):
    """What a tensor is checked for."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@lru_cache(maxsize=1024)
def check_parameters(
    heads: int, cast: torch.dtype | None, *looks: tuple[torch.Size, torch.dtype, torch.device] | None
) -> None:
    """Raises ValueError or TypeError unless the parameters belong together; `looks` are those of `LEARNED`."""
    x, *parameters = [None if look is None else Look(*look) for look in looks]
    assert x is not None
    width, fc1_weight = x.shape[-1], parameters[LEARNED.index("fc1_weight") - 1]
    hidden = fc1_weight.shape[0] if fc1_weight is not None and len(fc1_weight.shape) > 0 else 0
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide the width {width} of x, got {heads}")
    shapes = {
        "qkv_weight": [3 * width, width],
        "qkv_bias": [3 * width],
        "proj_weight": [width, width],
        "proj_bias": [width],
        "fc1_weight": [hidden, width],
        "fc1_bias": [hidden],
        "fc2_weight": [width, hidden],
        "fc2_bias": [width],
    }
    for name, look in zip(LEARNED[1:], parameters, strict=True):
        if look is not None:
            multiplies = name in shapes
            cast_to = cast if multiplies else None
            expected = shapes.get(name, [width])
            check_parameter(name, look, expected, like=x, fp32_allowed=not multiplies, cast_to=cast_to)


# Matrices are [T, D] and [T, M] inside, with T = B * N tokens. Operators cannot return None, so what is not kept for
# the backward pass, and a gradient that nothing needs, is an empty tensor.


class Call(NamedTuple):
    """The arguments of the operator."""

    x: Tensor  # [B, N, D]
    norm1_weight: Tensor
    norm1_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    layer_scale1: Tensor | None
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    layer_scale2: Tensor | None
    path_scale1: Tensor | None  # [B] float32
    path_scale2: Tensor | None
    heads: int
    eps: float
    tanh: bool
    causal: bool
    keep1: bool  # what the gradients of the attention half need, but norm1(x)
    keep_normed1: bool
    keep2: bool  # the sum that the MLP half starts with, and its statistics
    keep_normed2: bool
    keep_pre: bool
    keep_post: bool
    fp8: Fp8 | None = None  # no argument of the operator: with it, the functions here run without one

    def attention(self) -> attention_half.Call:
        scales, keep = (self.layer_scale1, self.path_scale1), (self.keep1, self.keep_normed1)
        return attention_half.Call(*self[:7], *scales, self.heads, self.eps, self.causal, *keep, self.fp8)

    def mlp(self) -> mlp_half.Call:
        """With x in the place of the sum after the attention half, for its shape and dtype."""
        scales, keep = (self.layer_scale2, self.path_scale2), (self.keep_normed2, self.keep_pre, self.keep_post)
        return mlp_half.Call(self.x, *self[8:14], *scales, self.eps, self.tanh, *keep, self.fp8)


ARGUMENTS = (
    "Tensor x, Tensor norm1_weight, Tensor norm1_bias, Tensor qkv_weight, Tensor qkv_bias, Tensor proj_weight,"
    " Tensor proj_bias, Tensor? layer_scale1, Tensor norm2_weight, Tensor norm2_bias, Tensor fc1_weight,"
    " Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor? layer_scale2, Tensor? path_scale1,"
    " Tensor? path_scale2, int heads, float eps, bool tanh, bool causal, bool keep1, bool keep_normed1,"
    " bool keep2, bool keep_normed2, bool keep_pre, bool keep_post"
)
LEARNED = Call._fields[:15]  # inputs that may have a gradient
KEPT = f"{attention_half.KEPT}, Tensor middle, " + mlp_half.KEPT.replace("mean", "mean2").replace(
    "rstd", "rstd2"
).replace("normed", "normed2")
AFTER_ATTENTION = len(attention_half.Kept._fields)  # where `middle`, the sum after the attention half, is among them
KEPT_LENGTH = AFTER_ATTENTION + 1 + len(mlp_half.Kept._fields)


def kept_for(recompute: Recompute, learns: Sequence[bool]) -> tuple[bool, bool, bool, bool, bool, bool]:
    """The last six arguments of `Call`, given which of `LEARNED` require a gradient."""
    if not torch.is_grad_enabled():
        return False, False, False, False, False, False
    keep1 = any(learns[:8])
    keep_normed1 = learns[3] and recompute != "all"
    return keep1, keep_normed1, any(learns), *mlp_half.kept_for(recompute, keep1, *learns[8:])


def launch_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """y [B, N, D], what the attention half keeps, the sum after it, and what the MLP half keeps."""
    call = Call(*arguments)
    with no_autocast(call.x.device):
        x = as_rows(call.x)
        kept = attention_half.forward_before_projection(call.attention(), x)
        of_mlp = call.mlp()
        handoff = handoff_to(of_mlp.layer("fc1"), x)
        middle, normed, mean, rstd = end_of_attention(call, x, kept.attended, handoff)
        if not call.keep1:
            kept = attention_half.Kept(*(tensor.new_empty(0) for tensor in kept))
        y, *kept_by_mlp = mlp_half.forward_after_norm(of_mlp, middle, normed, handoff)
    if not call.keep2:
        middle, mean, rstd = (tensor.new_empty(0) for tensor in (middle, mean, rstd))
    return y.view_as(call.x), *kept, middle, mean, rstd, *kept_by_mlp


def end_of_attention(
    call: Call, x: Tensor, attended: Tensor, handoff: Handoff
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The projection and the sum with x [T, D], its normalisation, and the statistics of that.

    handoff: what the normalisation is to leave for a product in FP8.
    """
    rows, weight, bias = as_rows(attended), as_rows(call.proj_weight), call.proj_bias.contiguous()
    norm = call.norm2_weight, call.norm2_bias, call.eps, call.fc1_weight.dtype
    scales = None if call.layer_scale1 is None else call.layer_scale1.contiguous(), call.path_scale1
    proj = call.attention().layer("proj")
    if proj is None and products.runs_triton("residual", rows.dtype, rows.device, rows.shape[0], *weight.shape):
        middle = products.linear_residual(rows, weight, bias, x, *scales)
        return middle, *normalise(middle, *norm, handoff=handoff)[1:]
    branch = torch.mm(rows, weight.T) if proj is None else proj.forward(rows, None)
    layer_scale, path_scale = scales
    return normalise(
        x, *norm, branch=branch, branch_bias=bias, layer_scale=layer_scale, path_scale=path_scale, handoff=handoff
    )


def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    y, *kept = attention_half.fake_forward(*call.attention())
    (batch, tokens, width), keep = call.x.shape, call.keep2
    middle = call.x.new_empty((batch * tokens, width) if keep else 0)
    _, *kept_by_mlp = mlp_half.fake_forward(*call.mlp())
    if not call.keep2:
        kept_by_mlp = [tensor.new_empty(0) for tensor in kept_by_mlp]
    return y, *kept, middle, *kept_by_mlp


def launch_backward(grad_y: Tensor, needed: Sequence[bool], *others: Any) -> tuple[Tensor, ...]:
    """Gradients of `LEARNED`; `needed` says of each whether anything needs it. `others` are what is kept, and Call."""
    call, middle = Call(*others[KEPT_LENGTH:]), others[AFTER_ATTENTION]
    kept = attention_half.Kept(*others[:AFTER_ATTENTION])
    kept_by_mlp = mlp_half.Kept(*others[AFTER_ATTENTION + 1 : KEPT_LENGTH])
    below = any(needed[:8])
    needs = dict(zip(attention_half.LEARNED, needed[:8], strict=True))
    needs_of_mlp = dict(zip(mlp_half.LEARNED, (below, *needed[8:]), strict=True))
    attention_call, sums = call.attention(), ColumnSums()
    with no_autocast(call.x.device):
        end = attention_half.end_of(attention_call, needs) if below else None
        gradients_of_mlp, branch = mlp_half.half_gradients(
            as_rows(grad_y), middle, call.mlp(), kept_by_mlp, needs_of_mlp, sums, before=end
        )
        gradients = {}
        if end is not None:
            grad_middle = gradients_of_mlp["x"]
            gradients = attention_half.half_gradients(
                grad_middle, as_rows(call.x), end, attention_call, kept, needs, sums, branch
            )
        sums.launch()
    if needed[0]:
        gradients["x"] = gradients["x"].view_as(call.x)
    found = [gradients.get(name) for name in attention_half.LEARNED]
    found += [gradients_of_mlp.get(name) for name in mlp_half.LEARNED[1:]]
    return needed_gradients(found, needed, call.x)


def fake_backward(grad_y: Tensor, needed: Sequence[bool], *others: Any) -> tuple[Tensor, ...]:
    return empty_gradients(Call(*others[KEPT_LENGTH:])[: len(LEARNED)], needed)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:17])
    ctx.options = inputs[17:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_y: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[: len(LEARNED)]
    gradients = transformer_block_backward_op(grad_y, needed, *ctx.saved_tensors, *ctx.options)
    without = (None,) * (len(Call._fields) - 1 - len(LEARNED))
    return *(g if need else None for g, need in zip(gradients, needed, strict=True)), *without


transformer_block_op = register_op(
    f"transformer_block({ARGUMENTS}) -> (Tensor y, {KEPT})", launch_forward, fake_forward
)
transformer_block_backward_op = register_op(
    f"transformer_block_backward(Tensor grad_y, bool[] needed, {KEPT}, {ARGUMENTS})"
    f" -> ({', '.join(f'Tensor grad_{name}' for name in LEARNED)})",
    launch_backward,
    fake_backward,
)
call_operator = register_gradient(transformer_block_op, transformer_block_backward_op, setup_context, backward)
