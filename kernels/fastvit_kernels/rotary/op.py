"""The public functions that normalise and rotate queries and keys, their checks, launches and gradient."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastvit_kernels.checks import check_device, check_floating, check_parameter
from fastvit_kernels.dispatch import HAS_TRITON, gpu, uses_triton
from fastvit_kernels.registration import register_gradient, register_op
from fastvit_kernels.rotary import reference

if HAS_TRITON:
    import triton

    from fastvit_kernels.launch import launch
    from fastvit_kernels.rotary import kernels

Layout = Literal["half", "interleaved"]
Norm = Literal["layer", "rms"]


def rotary_qk_norm(
    qkv: Tensor,
    sin: Tensor | None = None,
    cos: Tensor | None = None,
    *,
    prefix: int = 0,
    layout: Layout = "half",
    q_norm_weight: Tensor | None = None,
    q_norm_bias: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    k_norm_bias: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
) -> Tensor:
    """Normalises queries and keys head by head, then rotates them by their positions (Su et al. 2021), in one pass.

    x becomes cos * x + sin * turned(x), where `turned` takes each pair (a, b) of channels to (-b, a).

    Args:
        qkv: [B, N, 3, H, d], any floating dtype: as `attention` takes it.
        sin, cos: [N - prefix, d], any floating dtype, of each token and channel; None does not rotate. They have no
            gradient.
        prefix: number of tokens at the beginning that are not rotated: the class token and registers.
        layout: "half" pairs channel i with i + d / 2, as DINOv3 does; "interleaved" pairs neighbours, as EVA-02 and
            timm's `rot` do.
        q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias: [d], the dtype of qkv or float32. Without a weight there
            is no normalisation; without a bias nothing is added.
        norm: "layer" is layer normalisation, "rms" divides by the root mean square (Zhang and Sennrich 2019).
        eps: added to the variance.

    Returns qkv [B, N, 3, H, d], new, with the values copied, in the same dtype, under autocast too. All arithmetic is
    float32. Raises ValueError for a wrong shape, device, layout or combination and TypeError for a wrong dtype.
    """
    check_floating("qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must have shape [B, N, 3, H, d], got {list(qkv.shape)}")
    weights = Weights(q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias)
    check(qkv[:, :, 0], sin, cos, weights, prefix, layout, norm)
    options = prefix, layout == "interleaved", norm == "rms", eps
    if uses_triton("rotary", qkv):
        return rotary_op(qkv, None, sin, cos, *weights, *options)[0]
    q, k, v = qkv.unbind(2)
    return torch.stack([*both(q, k, sin, cos, weights, *options), v], dim=2)


def rotary_qk_norm_separate(
    q: Tensor,
    k: Tensor,
    sin: Tensor | None = None,
    cos: Tensor | None = None,
    *,
    prefix: int = 0,
    layout: Layout = "half",
    q_norm_weight: Tensor | None = None,
    q_norm_bias: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    k_norm_bias: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`rotary_qk_norm` of separate q and k, [B, N, H, d] each: returns both, new. `attention_qkv` takes them."""
    check_floating("q", q)
    if q.ndim != 4:
        raise ValueError(f"q must have shape [B, N, H, d], got {list(q.shape)}")
    check_parameter("k", k, q.shape, like=q)
    weights = Weights(q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias)
    check(q, sin, cos, weights, prefix, layout, norm)
    options = prefix, layout == "interleaved", norm == "rms", eps
    if uses_triton("rotary", q):
        return rotary_op(q, k, sin, cos, *weights, *options)
    return both(q, k, sin, cos, weights, *options)


class Weights(NamedTuple):
    """Of the normalisations, [d]."""

    q_weight: Tensor | None
    q_bias: Tensor | None
    k_weight: Tensor | None
    k_bias: Tensor | None


def check(
    q: Tensor, sin: Tensor | None, cos: Tensor | None, weights: Weights, prefix: int, layout: str, norm: str
) -> None:
    """q is [B, N, H, d]."""
    tokens, head_dim = q.shape[1], q.shape[3]
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {norm!r}")
    if (sin is None) != (cos is None):
        raise ValueError("sin and cos must be given together")
    if sin is None and weights.q_weight is None and weights.k_weight is None:
        raise ValueError("there is nothing to do: give sin and cos, q_norm_weight or k_norm_weight")
    if not 0 <= prefix <= tokens:
        raise ValueError(f"prefix must be from 0 to the {tokens} tokens, got {prefix}")
    for name, angles in (("sin", sin), ("cos", cos)):
        if angles is None:
            continue
        check_floating(name, angles)
        if head_dim % 2:
            raise ValueError(f"the head dimension must be even to rotate pairs of channels, got {head_dim}")
        if angles.shape != (tokens - prefix, head_dim):
            expected = [tokens - prefix, head_dim]
            raise ValueError(f"{name} must have shape [N - prefix, d] = {expected}, got {list(angles.shape)}")
        if angles.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, which is not computed: pass {name}.detach(), or do without")
        check_device(name, angles, like=q)
    for part, weight, bias in (("q", *weights[:2]), ("k", *weights[2:])):
        if weight is not None:
            check_parameter(f"{part}_norm_weight", weight, [head_dim], like=q, fp32_allowed=True)
        if bias is not None:
            check_parameter(f"{part}_norm_bias", bias, [head_dim], like=q, fp32_allowed=True)
            if weight is None:
                raise ValueError(f"{part}_norm_bias needs {part}_norm_weight")


def both(
    q: Tensor, k: Tensor, sin: Tensor | None, cos: Tensor | None, weights: Weights, *options: Any
) -> tuple[Tensor, Tensor]:
    return (
        reference.norm_and_rotate(q, weights.q_weight, weights.q_bias, sin, cos, *options),
        reference.norm_and_rotate(k, weights.k_weight, weights.k_bias, sin, cos, *options),
    )


# Inside, q alone, without k, is packed qkv [B, N, 3, H, d], and so are its result and gradient; k's is then empty.


def launch_forward(
    q: Tensor,
    k: Tensor | None,
    sin: Tensor | None,
    cos: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    prefix: int,
    interleaved: bool,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    outputs = fake_forward(q, k)
    inputs, results = parts(q, k), parts(*(outputs if k is not None else (outputs[0], None)))
    if outputs[0].numel() == 0:
        return outputs
    rows, tile = inputs[0].numel() // q.shape[-1], tile_of(q.shape[-1])
    sin, cos = (None if angles is None else as_rows(angles) for angles in (sin, cos))
    launch(
        kernels.rotary_fwd_kernel,
        (triton.cdiv(rows, tile["BLOCK_M"]), 2 if k is not None else 3),
        *inputs,
        *results,
        *(None if vector is None else vector.contiguous() for vector in (q_weight, q_bias, k_weight, k_bias)),
        sin,
        cos,
        *sizes(inputs[0], prefix),
        *inputs[0].stride()[:2],
        *inputs[1].stride()[:2],
        *results[0].stride()[:2],
        0 if sin is None else sin.stride(0),
        0 if cos is None else cos.stride(0),
        eps,
        INTERLEAVED=interleaved,
        RMS=rms,
        **tile,
    )
    return outputs


def fake_forward(q: Tensor, k: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape)


def launch_backward(
    grad_q: Tensor,
    grad_k: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    sin: Tensor | None,
    cos: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    prefix: int,
    interleaved: bool,
    rms: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and the weights; q and k are given if there are weights."""
    gradients = fake_backward(grad_q, grad_k, q, k, sin, cos, q_weight, q_bias, k_weight, k_bias)
    outputs = parts(gradients[0], None if grad_k is None else gradients[1])
    incoming = parts(grad_q, grad_k)
    inputs = (None, None, None) if q is None else parts(q, k)
    head_dim, on = grad_q.shape[-1], gpu(grad_q.device)
    tile, rows = tile_of(head_dim), incoming[0].numel() // max(1, head_dim)
    if rows == 0:
        return tuple(gradient.zero_() for gradient in gradients)
    programs = min(triton.cdiv(rows, tile["BLOCK_M"]), 4 * on.multiprocessors)
    partial = grad_q.new_empty(2, 2, programs, head_dim, dtype=torch.float32)
    sin, cos = (None if angles is None else as_rows(angles) for angles in (sin, cos))
    q_part, k_part = inputs[:2]
    launch(
        kernels.rotary_bwd_kernel,
        (programs, 3 if grad_k is None else 2),
        *incoming,
        q_part,
        k_part,
        *outputs,
        None if q_weight is None else q_weight.contiguous(),
        None if k_weight is None else k_weight.contiguous(),
        None if q is None else partial,
        sin,
        cos,
        *sizes(incoming[0], prefix),
        *incoming[0].stride()[:2],
        *incoming[1].stride()[:2],
        *((0, 0) if q_part is None else q_part.stride()[:2]),
        *((0, 0) if k_part is None else k_part.stride()[:2]),
        *outputs[0].stride()[:2],
        0 if sin is None else sin.stride(0),
        0 if cos is None else cos.stride(0),
        eps,
        INTERLEAVED=interleaved,
        RMS=rms,
        **tile,
    )
    if q is not None:
        for part, vectors in zip(partial, (gradients[2:4], gradients[4:6]), strict=True):
            for shares, vector in zip(part, vectors, strict=True):
                if vector.numel() > 0:
                    vector.copy_(shares.sum(dim=0))
    return gradients


def fake_backward(
    grad_q: Tensor, grad_k: Tensor | None, q: Tensor | None, k: Tensor | None, sin: Any, cos: Any, *others: Any
) -> tuple[Tensor, ...]:
    vectors = (grad_q.new_empty(0) if w is None else w.new_empty(w.shape) for w in others[:4])
    return (
        grad_q.new_empty(grad_q.shape),
        grad_q.new_empty(0 if grad_k is None else grad_k.shape),
        *vectors,
    )


def parts(q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, k and, if packed, v, [B, N, H, d]: the numbers of a head, and the heads of a token, adjacent in memory."""
    if k is None:
        packed = adjacent(q)
        return packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]
    return adjacent(q), adjacent(k), None


def adjacent(x: Tensor) -> Tensor:
    heads, head_dim = x.shape[-2:]
    return x if x.stride(-1) == 1 and (heads == 1 or x.stride(-2) == head_dim) else x.contiguous()


def as_rows(angles: Tensor) -> Tensor:
    return angles if angles.stride(1) == 1 else angles.contiguous()


def sizes(x: Tensor, prefix: int) -> tuple[int, int, int, int, int]:
    batch, tokens, heads, head_dim = x.shape
    return batch * tokens * heads, tokens, heads, head_dim, prefix


def tile_of(head_dim: int) -> dict[str, int]:
    """About 2,048 numbers per program of 128 threads."""
    columns = max(16, triton.next_power_of_2(head_dim))
    return {"BLOCK_M": max(1, 2048 // columns), "BLOCK_D": columns, "num_warps": 4}


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, sin, cos, q_weight, q_bias, k_weight, k_bias, *options = inputs
    normalised = q_weight is not None or k_weight is not None  # a rotation alone needs no input again
    ctx.packed, ctx.options = k is None, options
    ctx.save_for_backward(
        q if normalised else None, k if normalised else None, sin, cos, q_weight, q_bias, k_weight, k_bias
    )
    if k is None:
        ctx.mark_non_differentiable(output[1])


def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    gradients = rotary_backward_op(grad_q, None if ctx.packed else grad_k, *ctx.saved_tensors, *ctx.options)
    given = ctx.saved_tensors[4:]
    vectors = (None if w is None else gradient for w, gradient in zip(given, gradients[2:], strict=True))
    return gradients[0], None if ctx.packed else gradients[1], None, None, *vectors, *[None] * 4


VECTORS = "Tensor? sin, Tensor? cos, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias"
OPTIONS = "SymInt prefix, bool interleaved, bool rms, float eps"
rotary_op = register_op(
    f"rotary_qk_norm(Tensor q, Tensor? k, {VECTORS}, {OPTIONS}) -> (Tensor q_out, Tensor k_out)",
    launch_forward,
    fake_forward,
)
rotary_backward_op = register_op(
    f"rotary_qk_norm_backward(Tensor grad_q, Tensor? grad_k, Tensor? q, Tensor? k, {VECTORS}, {OPTIONS})"
    " -> (Tensor grad_q_in, Tensor grad_k_in, Tensor grad_q_weight, Tensor grad_q_bias, Tensor grad_k_weight,"
    " Tensor grad_k_bias)",
    launch_backward,
    fake_backward,
)
register_gradient(rotary_op, rotary_backward_op, setup_context, backward)
