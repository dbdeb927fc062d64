"""The public SwiGLU functions, their checks, launches and gradient."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastvit_kernels.checks import check_floating, check_parameter, check_rate, check_tokens
from fastvit_kernels.column_sums import ColumnSums
from fastvit_kernels.dispatch import HAS_TRITON, autocast_dtype, gpu, uses_triton
from fastvit_kernels.gemm import products
from fastvit_kernels.half_block import End, Norm, needed_gradients
from fastvit_kernels.layer_norm.op import as_rows, normalise
from fastvit_kernels.registration import no_autocast, register_gradient, register_op
from fastvit_kernels.residual import draw_path_scale
from fastvit_kernels.swiglu import reference

if HAS_TRITON:
    import triton

    from fastvit_kernels.launch import launch
    from fastvit_kernels.swiglu import kernels

Recompute = Literal["none", "gate", "all"]
Weight = Tensor | Sequence[Tensor]
Bias = Tensor | Sequence[Tensor] | None


def swiglu_mlp(
    x: Tensor,
    fc1_weight: Weight,
    fc1_bias: Bias,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    recompute: Recompute = "gate",
) -> Tensor:
    """The gated MLP fc2(silu(gate) * value), where gate and value are the halves of fc1(x) (Shazeer 2020).

    Args:
        x: [..., D], any floating dtype.
        fc1_weight, fc1_bias: [2M, D] and [2M], the gate first, as timm's SwiGLUPacked and DINOv2's w12 have them; or
            pairs (of the gate, of the value) of [M, D] and [M], as timm's SwiGLU has them, which are copied into one
            at each call. A bias of None is 0.
        fc2_weight, fc2_bias: [D, M] and [D]. Both layers have the dtype of x; under autocast any that it casts.
        recompute: what the kernels' backward pass computes again instead of keeping it: nothing ("none"), or fc2's
            input ("gate", "all"). Gradients are the same.

    Returns [..., D] in the dtype of x or, as from `torch.nn.functional.linear`, in that of autocast. Raises ValueError
    for a wrong shape, device or recompute and TypeError for a wrong dtype.
    """
    check_floating("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., D], got {list(x.shape)}")
    cast = autocast_dtype(x)
    fc1_weight, fc1_bias, fc2_bias = checked(x, cast, fc1_weight, fc1_bias, fc2_weight, fc2_bias, recompute)
    if not uses_triton("swiglu", x):
        return reference.swiglu_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if cast is not None:
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = (
            t.to(cast) for t in (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        )
    inputs = Inputs(x, None, None, fc1_weight, fc1_bias, fc2_weight, fc2_bias, None, None)
    return call_operator(*inputs, 0.0, *kept(inputs, recompute))


def layer_norm_swiglu(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Weight,
    fc1_bias: Bias,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    eps: float,
    layer_scale: Tensor | None = None,
    drop_path: float = 0.0,
    recompute: Recompute = "gate",
) -> Tensor:
    """The MLP half of a pre-norm block with a gated MLP: x + drop_path(layer_scale * swiglu_mlp(norm(x))).

    Args:
        x: [B, N, D], any floating dtype.
        norm_weight, norm_bias: [D], the dtype of x or float32.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: see `swiglu_mlp`.
        layer_scale: [D], the dtype of x or float32; None leaves it out.
        drop_path: rate at which a sample's whole branch is dropped; kept branches are scaled by 1 / (1 - drop_path).
            Active whenever above 0.
        recompute: as in `swiglu_mlp`; "all" computes the normalisation again, too. What no gradient will need is never
            kept.

    Returns [B, N, D] in the dtype of x, also under autocast: products run in its dtype, the normalisation and the sum
    with x in that of x (float32 if one is float16 and the other bfloat16). Raises ValueError for a wrong shape, device,
    rate or recompute and TypeError for a wrong dtype.
    """
    check_tokens("x", x)
    check_parameter("norm_weight", norm_weight, x.shape[-1:], like=x, fp32_allowed=True)
    check_parameter("norm_bias", norm_bias, x.shape[-1:], like=x, fp32_allowed=True)
    cast = autocast_dtype(x)
    fc1_weight, fc1_bias, fc2_bias = checked(x, cast, fc1_weight, fc1_bias, fc2_weight, fc2_bias, recompute)
    if layer_scale is not None:
        check_parameter("layer_scale", layer_scale, x.shape[-1:], like=x, fp32_allowed=True)
    check_rate("drop_path", drop_path)
    path_scale = draw_path_scale(x, drop_path)
    inputs = Inputs(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, path_scale)
    if not uses_triton("swiglu", x):
        fc2 = fc2_weight, fc2_bias
        return reference.layer_norm_swiglu(
            x, norm_weight, norm_bias, fc1_weight, fc1_bias, *fc2, layer_scale, path_scale, eps
        )
    if cast is not None:
        inputs = inputs._replace(
            x=x.to(torch.promote_types(x.dtype, cast)),
            fc1_weight=fc1_weight.to(cast),
            fc1_bias=fc1_bias.to(cast),
            fc2_weight=fc2_weight.to(cast),
            fc2_bias=fc2_bias.to(cast),
        )
    return call_operator(*inputs, eps, *kept(inputs, recompute))


def checked(
    x: Tensor,
    cast: torch.dtype | None,
    fc1_weight: Weight,
    fc1_bias: Bias,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    recompute: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """fc1's weight [2M, D] and bias [2M], and fc2's bias [D]."""
    width = x.shape[-1]
    if fc2_weight.ndim != 2 or fc2_weight.numel() == 0:
        raise ValueError(f"fc2_weight must have shape [{width}, M], got {list(fc2_weight.shape)}")
    hidden = fc2_weight.shape[1]
    fc1_weight = joined("fc1_weight", fc1_weight, [hidden, width], x, cast)
    fc1_bias = fc1_weight.new_zeros(2 * hidden) if fc1_bias is None else joined("fc1_bias", fc1_bias, [hidden], x, cast)
    fc2_bias = fc2_weight.new_zeros(width) if fc2_bias is None else fc2_bias
    check_parameter("fc2_weight", fc2_weight, [width, hidden], like=x, cast_to=cast)
    check_parameter("fc2_bias", fc2_bias, [width], like=x, cast_to=cast)
    check_parameter("fc1_weight", fc1_weight, [2 * hidden, width], like=x, cast_to=cast)
    check_parameter("fc1_bias", fc1_bias, [2 * hidden], like=x, cast_to=cast)
    if recompute not in get_args(Recompute):
        raise ValueError(f"recompute must be one of {', '.join(get_args(Recompute))}, got {recompute!r}")
    return fc1_weight, fc1_bias, fc2_bias


def joined(
    name: str, given: Tensor | Sequence[Tensor], shape: list[int], x: Tensor, cast: torch.dtype | None
) -> Tensor:
    """The gate's part and the value's, each of this shape, as one tensor, if they are given as a pair."""
    if isinstance(given, Tensor):
        return given
    if len(given) != 2 or not all(isinstance(part, Tensor) for part in given):
        raise ValueError(f"{name} must be a tensor, or a pair of tensors: of the gate and of the value")
    for part, tensor in zip(("gate", "value"), given, strict=True):
        check_parameter(f"{name} of the {part}", tensor, shape, like=x, cast_to=cast)
    return torch.cat(tuple(given))


class Inputs(NamedTuple):
    """The tensors of the operator. Without a normalisation there is no residual connection either."""

    x: Tensor  # [B, N, D]; [..., D] without a normalisation
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    fc1_weight: Tensor  # [2M, D]
    fc1_bias: Tensor
    fc2_weight: Tensor  # [D, M]
    fc2_bias: Tensor
    layer_scale: Tensor | None
    path_scale: Tensor | None  # [B] float32

    @property
    def learned(self) -> tuple[Tensor | None, ...]:
        """Those that may have a gradient."""
        return self[:-1]


LEARNED = Inputs._fields[:-1]


def kept(inputs: Inputs, recompute: str) -> tuple[bool, bool, bool]:
    """Whether the backward pass will need norm(x), for fc1, fc1's output, and fc2's input."""
    learns = {n: t is not None and t.requires_grad for n, t in zip(LEARNED, inputs.learned, strict=True)}
    above_gate = learns["fc2_weight"] or learns["layer_scale"]
    below_gate = any(learns[name] for name in ("x", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias"))
    keep_post = above_gate and recompute == "none"
    keep_pre = below_gate or (above_gate and not keep_post)
    keep_normed = inputs.norm_weight is not None and learns["fc1_weight"] and recompute != "all"
    grad = torch.is_grad_enabled()
    return grad and keep_normed, grad and keep_pre, grad and keep_post


# Matrices are [T, D], [T, M] and [T, 2M] inside, with T tokens. Operators cannot return None, so what is not kept for
# the backward pass, and a gradient that is not needed, is an empty tensor [0].


def launch_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """The output, and what is kept: see `fake_forward`. The arguments are `Inputs`, eps and what to keep."""
    inputs, (eps, keep_normed, keep_pre, keep_post) = Inputs(*arguments[: len(Inputs._fields)]), arguments[-4:]
    x, fc1_weight, rows = inputs.x, as_rows(inputs.fc1_weight), as_rows(inputs.x)
    with no_autocast(x.device):
        normed, mean, rstd = operand(inputs, eps)
        pre = products.linear(normed, fc1_weight, inputs.fc1_bias.contiguous())
        post = gate(pre)
        fc2 = as_rows(inputs.fc2_weight), inputs.fc2_bias.contiguous()
        if inputs.norm_weight is None:
            y = products.linear(post, *fc2)
        else:
            scale = None if inputs.layer_scale is None else inputs.layer_scale.contiguous()
            y = products.linear_residual(post, *fc2, rows, scale, inputs.path_scale)
    kept_tensors = (
        t if keep else t.new_empty(0) for t, keep in ((normed, keep_normed), (pre, keep_pre), (post, keep_post))
    )
    return y.view(x.shape), mean, rstd, *kept_tensors


def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (_, keep_normed, keep_pre, keep_post) = Inputs(*arguments[: len(Inputs._fields)]), arguments[-4:]
    x, weight = inputs.x, inputs.fc2_weight
    width, hidden = weight.shape
    tokens = x.numel() // x.shape[-1]
    mean, rstd = (
        x.new_empty(0 if inputs.norm_weight is None else tokens, dtype=torch.float32) for _ in range(2)
    )  # of the rows of x
    normed = weight.new_empty((tokens, width) if keep_normed else 0)
    pre = weight.new_empty((tokens, 2 * hidden) if keep_pre else 0)  # fc1's output
    post = weight.new_empty((tokens, hidden) if keep_post else 0)  # fc2's input
    return x.new_empty(x.shape), mean, rstd, normed, pre, post


def operand(inputs: Inputs, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What fc1 multiplies, [T, D], with the mean and 1 / standard deviation of the rows of x if it is norm(x)."""
    if inputs.norm_weight is None or inputs.norm_bias is None:
        mean, rstd = (inputs.x.new_empty(0, dtype=torch.float32) for _ in range(2))
        return as_rows(inputs.x), mean, rstd
    return normalise(as_rows(inputs.x), inputs.norm_weight, inputs.norm_bias, eps, inputs.fc1_weight.dtype)[1:]


BLOCK_M, BLOCK_N, WARPS = 16, 128, 4  # of the elementwise kernels, which wait for memory whatever their tiles


def gate(pre: Tensor) -> Tensor:
    """silu(gate) * value, [T, M], for pre [T, 2M]."""
    rows, width = len(pre), pre.shape[1] // 2
    post = pre.new_empty(rows, width)
    if post.numel() > 0:
        grid = triton.cdiv(rows, BLOCK_M), triton.cdiv(width, BLOCK_N)
        launch(
            kernels.swiglu_fwd_kernel, grid, pre, post, rows, width, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=WARPS
        )
    return post


def gate_gradient(grad: Tensor, pre: Tensor, recompute: bool, column_sum: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of pre [T, 2M] for that of `gate(pre)`, its partial column sums, and `gate(pre)`, if wanted."""
    (rows, width), on = grad.shape, gpu(grad.device)
    blocks_n = triton.cdiv(width, BLOCK_N)
    programs = min(triton.cdiv(rows, BLOCK_M), triton.cdiv(8 * on.multiprocessors, blocks_n))
    grad_pre, post = torch.empty_like(pre), grad.new_empty(grad.shape if recompute else 0)
    partial = grad.new_empty((programs, 2 * width) if column_sum else 0, dtype=torch.float32)
    launch(
        kernels.swiglu_bwd_kernel,
        (blocks_n, programs),
        grad,
        pre,
        grad_pre,
        post if recompute else None,
        partial if column_sum else None,
        rows,
        width,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        num_warps=WARPS,
    )
    return grad_pre, partial, post


def launch_backward(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of `LEARNED`; arguments are `Inputs`, the outputs of the forward pass but y, eps and what is needed."""
    inputs, (mean, rstd, normed, pre, post, eps, needed) = Inputs(*arguments[: len(Inputs._fields)]), arguments[-7:]
    needs = dict(zip(LEARNED, needed, strict=True))
    below_norm = needs["x"] or needs["norm_weight"] or needs["norm_bias"]
    below_gate = below_norm or needs["fc1_weight"] or needs["fc1_bias"]
    end = End(
        as_rows(inputs.fc2_weight),
        inputs.fc2_bias.contiguous(),
        None if inputs.layer_scale is None else inputs.layer_scale.contiguous(),
        inputs.path_scale,
        needs_weight=needs["fc2_weight"],
        needs_bias=needs["fc2_bias"],
        needs_layer_scale=needs["layer_scale"],
        needs_inner=below_gate,
    )
    recompute, grad_rows, sums = end.needs_product and not is_kept(post), as_rows(grad_y), ColumnSums()
    has_norm = inputs.norm_weight is not None
    # where LayerNorm's gradient reads grad_y as it is, it also adds up its columns
    sum_in_norm = has_norm and below_norm and end.needs_sum and not end.changes(grad_y)
    found: dict[str, Any] = {}
    with no_autocast(grad_y.device):
        grad = end.gradient(grad_rows, column_sum=end.needs_sum and not sum_in_norm)
        if below_gate:
            grad_post = products.input_gradient(grad.scaled, end.weight)
            grad_pre, partial, again = gate_gradient(grad_post, pre, recompute, needs["fc1_bias"])
            if needs["fc1_bias"]:
                found["fc1_bias"] = torch.empty_like(inputs.fc1_bias)
                sums.add(partial, found["fc1_bias"])
            post = again if recompute else post
            del grad_post, again
        elif recompute:
            post = gate(pre)
        found["fc2_weight"], found["fc2_bias"], found["layer_scale"] = end.parameter_gradients(grad, post, sums)
        post = post.new_empty(0)  # frees [T, M] if it was computed again
        if needs["fc1_weight"]:
            if not is_kept(normed):
                normed, _, _ = operand(inputs, eps)
            found["fc1_weight"] = products.weight_gradient(grad_pre, normed)
        if below_norm:
            grad_normed = products.input_gradient(grad_pre, as_rows(inputs.fc1_weight))
            if sum_in_norm:
                found["fc2_bias"] = torch.empty_like(end.bias)
            found |= input_gradients(
                inputs, grad_rows, grad_normed, mean, rstd, needs, sums, found["fc2_bias"] if sum_in_norm else None
            )
        sums.launch()
    return needed_gradients([found.get(name) for name in LEARNED], needed, inputs.x)


def input_gradients(
    inputs: Inputs,
    grad_y: Tensor,
    grad_normed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: dict[str, bool],
    sums: ColumnSums,
    grad_y_sum: Tensor | None,
) -> dict[str, Tensor]:
    """The gradients of x and the normalisation, for that of what fc1 multiplies; grad_y is [T, D]."""
    x, weight, bias = inputs.x, inputs.norm_weight, inputs.norm_bias
    if weight is None or bias is None:
        return {"x": grad_normed.view(x.shape)}
    norm = Norm(as_rows(x), weight, bias, mean, rstd, needs["norm_weight"], needs["norm_bias"])
    grad_x, grad_weight, grad_bias, _ = norm.gradients(grad_y, grad_normed, sums, grad_y_sum=grad_y_sum)
    return {"x": grad_x.view(x.shape), "norm_weight": grad_weight, "norm_bias": grad_bias}


def fake_backward(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, needed = Inputs(*arguments[: len(Inputs._fields)]), arguments[-1]
    return tuple(
        inputs.x.new_empty(0) if tensor is None or not need else tensor.new_empty(tensor.shape)
        for tensor, need in zip(inputs.learned, needed, strict=True)
    )


def is_kept(tensor: Tensor) -> bool:
    """Whether a matrix was kept for the backward pass: else it is empty, [0]."""
    return tensor.ndim == 2


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = Inputs(*inputs[: len(Inputs._fields)])
    ctx.eps = inputs[len(tensors)]
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_y: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needed: Sequence[bool] = ctx.needs_input_grad[: len(LEARNED)]
    gradients = swiglu_mlp_backward_op(grad_y, *ctx.saved_tensors, ctx.eps, needed)
    without = (None,) * 5  # path_scale, and what is no tensor
    return *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), *without


INPUTS = (
    "Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight,"
    " Tensor fc2_bias, Tensor? layer_scale, Tensor? path_scale"
)
KEPT = "Tensor mean, Tensor rstd, Tensor normed, Tensor pre, Tensor post"
swiglu_mlp_op = register_op(
    f"swiglu_mlp({INPUTS}, float eps, bool keep_normed, bool keep_pre, bool keep_post) -> (Tensor y, {KEPT})",
    launch_forward,
    fake_forward,
)
swiglu_mlp_backward_op = register_op(
    f"swiglu_mlp_backward(Tensor grad_y, {INPUTS}, {KEPT}, float eps, bool[] needed) -> ("
    + ", ".join(f"Tensor grad_{name}" for name in LEARNED)
    + ")",
    launch_backward,
    fake_backward,
)
call_operator = register_gradient(swiglu_mlp_op, swiglu_mlp_backward_op, setup_context, backward)
