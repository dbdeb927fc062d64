"""The launches of attention, its registered operators, and their gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit_kernels.attention import providers
from fastvit_kernels.attention.tiling import (
    Tiling,
    backward_key_tiling,
    backward_query_tiling,
    bias_gradient_tiling,
    forward_tiling,
    launch_options,
    pieces,
)
from fastvit_kernels.column_sums import ColumnSums
from fastvit_kernels.dispatch import HAS_TRITON, Gpu, gpu
from fastvit_kernels.registration import register_gradient, register_op

if HAS_TRITON:
    import triton

    from fastvit_kernels.attention import kernels
    from fastvit_kernels.launch import launch


class Call(NamedTuple):
    """The arguments of the operator. `q` alone, without k and v, is packed [..., 3, H, d], and so is its gradient."""

    q: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None  # [B or 1, H or 1, N, M]
    seed: Tensor | None = None  # of dropout
    dropout: float = 0.0
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    scale: float | None = None  # of scores, before the bias; None is 1 / sqrt(d)
    causal: bool = False  # the last query sees all keys, the one before it all but the last

    @property
    def plain(self) -> bool:
        """Whether it is softmax(q k^T / sqrt(d)) v and nothing else, which all of `providers` compute."""
        usual = self.scale in (None, self.q.shape[-1] ** -0.5) and not self.causal
        return usual and self.bias is None and self.seed is None and self.cu_seqlens_q is None


def launch_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Output and `lse`, see `fake_forward`; the arguments are those of `Call`."""
    call = Call(*arguments)
    q, k, v = separate(call)
    out, lse = empty_outputs(q)
    if out.numel() == 0 or k.numel() == 0:  # without keys, the output is 0
        return out.zero_(), lse.fill_(math.inf)
    if (runs := providers.chosen(providers.forward_runs, q, call.plain)) != "triton":
        return providers.forward(runs, q, k, v)
    programs, lengths, cut = cuts(forward_tiling, call, q, k, call.max_seqlen_q)
    qkv, options, sizes, scale = common_arguments(call, q, k, v)
    launch(kernels.attention_fwd_kernel, (programs,), qkv, out, lse, *options, lengths, *sizes, scale, **cut)
    return out, lse


def fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = Call(*arguments)
    return empty_outputs(call.q.select(-3, 0) if call.k is None else call.q)


def empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    *images, tokens, heads, head_dim = q.shape
    return (
        q.new_empty(*images, tokens, heads * head_dim),
        q.new_empty(*images, heads, tokens, dtype=torch.float32),  # log2 of the sum of 2 ** (scale * q k^T)
    )


def launch_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, causal: bool = False) -> Tensor:
    """The gradient of packed q, k and v in a call without anything else but a causal mask."""
    return launch_gradients(grad_out, out, lse, False, *Call(qkv, causal=causal))[0]


def launch_backward_and_sums(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    column_sum: Tensor,
    sums: ColumnSums,
    causal: bool = False,
) -> Tensor:
    """`launch_backward`, and the sum of the gradient over all tokens: what a bias that was added to qkv gets.

    After `sums.launch()` it is in column_sum [3*H*d], contiguous, any floating dtype. The part of the queries is a sum
    of the gradient before it is rounded. The probabilities of a query add up to 1, as it sees itself at least, so the
    part of the values is the sum of `grad_out`. A bias of the keys adds the same to all scores of a query and changes
    nothing: its gradient is 0.
    """
    grad_qkv = qkv.new_empty(*qkv.shape)
    partial = write_gradients(Call(qkv, causal=causal), grad_out, out, lse, (grad_qkv,), with_sums=True)
    if not partial:
        summed = grad_qkv.select(-3, 0).flatten(-2), grad_out
        partial = tuple(gradient.sum((0, 1), dtype=torch.float32)[None] for gradient in summed)
    of_queries, of_output = partial
    for_queries, for_keys, for_values = column_sum.chunk(3)
    sums.add(of_queries, for_queries)
    sums.add(of_queries[:0], for_keys)  # no rows add up to 0
    sums.add(of_output, for_values)
    return grad_qkv


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def launch_gradients(grad_out: Tensor, out: Tensor, lse: Tensor, bias_needs_it: bool, *arguments: Any) -> Gradients:
    """Gradients of q, k, v and the bias, see `fake_gradients`; `arguments` are those of `Call`."""
    gradients = fake_gradients(grad_out, out, lse, bias_needs_it, *arguments)
    write_gradients(Call(*arguments), grad_out, out, lse, gradients)
    return gradients


def write_gradients(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, gradients: tuple[Tensor, ...], with_sums: bool = False
) -> tuple[Tensor, ...]:
    """Fills `gradients`, for packed q, k and v the first alone. Returns partial column sums, or () if there are none.

    They are those of the gradients of q and of the output, [programs, H*d] float32 each: if `with_sums`, which is not
    for calls with lengths, and if our kernels run.
    """
    q, k, v = separate(call)
    grad_q, grad_k, grad_v = gradients[0].unbind(-3) if call.k is None else gradients[:3]
    if q.numel() == 0 or k.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return ()
    if (runs := providers.chosen(providers.backward_runs, q, call.plain)) != "triton":
        of_each = providers.backward(runs, grad_out, q, k, v, out, lse)
        for gradient, computed in zip((grad_q, grad_k, grad_v), of_each, strict=True):
            gradient.copy_(computed)
        return ()
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    delta, grad_out_strides = torch.empty_like(lse), strides(grad_out, 1)
    qkv, options, sizes, scale = common = common_arguments(call, q, k, v)
    programs, lengths, cut = cuts(backward_query_tiling, call, q, k, call.max_seqlen_q)
    heads, head_dim = q.shape[-2:]
    sums = tuple(lse.new_empty(programs // heads, heads * head_dim) for _ in range(2)) if with_sums else ()
    launch(
        kernels.attention_bwd_query_kernel,
        (programs,),
        qkv,
        out,
        grad_out,
        lse,
        delta,
        grad_q,
        sums or None,
        *options,
        lengths,
        *sizes,
        grad_out_strides,
        grad_q.stride(-3),
        scale,
        **cut,
    )
    programs, lengths, cut = cuts(backward_key_tiling, call, k, q, call.max_seqlen_k)
    launch(
        kernels.attention_bwd_key_kernel,
        (programs,),
        qkv,
        grad_out,
        lse,
        delta,
        grad_k,
        grad_v,
        *options,
        lengths,
        *sizes,
        grad_out_strides,
        grad_k.stride(-3),
        scale,
        **cut,
    )
    if call.bias is not None and gradients[3].numel() > 0:
        launch_bias_gradient(q, k, (grad_out, lse, delta), gradients[3], common, call.causal)
    return sums


def launch_bias_gradient(
    q: Tensor, k: Tensor, of_rows: tuple[Tensor, Tensor, Tensor], grad_bias: Tensor, common: Common, causal: bool
) -> None:
    """A sum over the images and heads that have a bias in common: in shares, until there are programs enough.

    `of_rows` are the gradient of the output, `lse` and `delta`, see `kernels`.
    """
    device, (batch, tokens, heads, head_dim), keys = gpu(q.device), q.shape, k.shape[1]
    bias_batch, bias_heads = grad_bias.shape[:2]
    tiling = bias_gradient_tiling(head_dim, q.dtype, device.arch)
    blocks = bias_batch * bias_heads * triton.cdiv(tokens, tiling.rows) * triton.cdiv(keys, tiling.columns)
    images_in_common, heads_in_common = batch // bias_batch, heads // bias_heads
    shares = min(images_in_common * heads_in_common, triton.cdiv(2 * device.multiprocessors, blocks))
    parts = torch.empty(shares, *grad_bias.shape, dtype=torch.float32, device=q.device)
    launch(
        kernels.attention_bwd_bias_kernel,
        (shares * blocks,),
        common.qkv,
        *of_rows,
        parts,
        *common.options,
        *common.sizes,
        bias_heads,
        images_in_common,
        heads_in_common,
        shares,
        strides(of_rows[0], 1),
        common.scale,
        HEAD_DIM=head_dim,
        PIECES=pieces(head_dim),
        BLOCK_M=tiling.rows,
        BLOCK_N=tiling.columns,
        STAGES=tiling.stages,
        CAUSAL=causal,
        num_warps=tiling.num_warps,
    )
    grad_bias.copy_(parts.sum(0))


def fake_gradients(grad_out: Tensor, out: Tensor, lse: Tensor, bias_needs_it: bool, *arguments: Any) -> Gradients:
    call = Call(*arguments)
    grad_k, grad_v = (call.q.new_empty(0 if part is None else part.shape) for part in (call.k, call.v))
    bias = call.bias if bias_needs_it else None
    grad_bias = call.q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return call.q.new_empty(call.q.shape), grad_k, grad_v, grad_bias


def separate(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, [B, N, H, d] or [T, H, d]: the numbers of a head, and the heads of a token, adjacent in memory."""

    def adjacent(x: Tensor) -> Tensor:
        heads, head_dim = x.shape[-2:]
        return x if x.stride(-1) == 1 and (heads == 1 or x.stride(-2) == head_dim) else x.contiguous()

    if call.k is None or call.v is None:
        q, k, v = adjacent(call.q).unbind(-3)
        return q, k, v
    return adjacent(call.q), adjacent(call.k), adjacent(call.v)


def cuts(
    tiling_of: Callable[[int, torch.dtype, int, Gpu], Tiling],
    call: Call,
    owned: Tensor,
    streamed: Tensor,
    longest: int | None,
) -> tuple[int, Any, dict[str, Any]]:
    """How many programs a kernel has, its `lengths`, and its constants, which divide tokens among programs."""
    tokens, heads, head_dim = owned.shape[-3:]
    tiling = with_room(tiling_of(head_dim, owned.dtype, longest or tokens, gpu(owned.device)), call)
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None or longest is None:
        tail_of = 0 if call.causal else streamed.shape[-3]  # a causal mask is laid over every block
        blocks, options = launch_options(tiling, tokens, tail_of, head_dim, call.causal)
        return owned.shape[0] * heads * blocks, None, options
    sequences, blocks = len(call.cu_seqlens_q) - 1, max(1, triton.cdiv(longest, tiling.rows))
    lengths = call.cu_seqlens_q.contiguous(), call.cu_seqlens_k.contiguous(), sequences, blocks
    programs = (sequences + 1) * heads * blocks  # one more for what lies behind the last sequence
    return programs, lengths, launch_options(tiling, 0, 0, head_dim, call.causal)[1]  # every block is masked, no tails


class Common(NamedTuple):
    """The arguments that all kernels have, see `kernels`. Strides that q, k and v have in common are given once."""

    qkv: tuple[Any, ...]
    options: tuple[Any, Any]  # bias and dropout
    sizes: tuple[int, int | None, int]  # tokens, keys, heads
    scale: float


def common_arguments(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Common:
    tokens, heads, head_dim = q.shape[-3:]
    of_each = [strides(x, 2) for x in ((q,) if call.k is None else (q, k, v))]  # packed, they have the same
    bias = None
    if call.bias is not None:
        (images, bias_heads), (of_image, of_head, of_query, of_key) = call.bias.shape[:2], call.bias.stride()
        bias = call.bias, of_image if images > 1 else 0, of_head if bias_heads > 1 else 0, of_query, of_key
    return Common(
        (q, k, v, *(of_each[:1] if len(set(of_each)) == 1 else of_each)),
        (bias, None if call.seed is None else (call.seed, call.dropout)),
        (tokens, None if k.shape[-3] == tokens else k.shape[-3], heads),
        math.log2(math.e) * (head_dim**-0.5 if call.scale is None else call.scale),
    )


def strides(x: Tensor, inner: int) -> tuple[int, int]:
    """From image to image and from token to token of [B, N, ...] or [T, ...], where "..." are `inner` dimensions."""
    of_all = x.stride()
    return of_all[0] if len(of_all) == inner + 2 else 0, of_all[-1 - inner]


def with_room(tiling: Tiling, call: Call) -> Tiling:
    """A bias, dropout, and masks, need registers: half the columns for each, and no limit on registers."""
    masked = call.causal or call.cu_seqlens_q is not None
    needs = (call.bias is not None) + (call.seed is not None) + masked
    return tiling._replace(columns=max(16, tiling.columns >> needs), max_registers=None) if needs else tiling


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    tensors = [argument if isinstance(argument, Tensor) else None for argument in inputs]
    ctx.save_for_backward(out, lse, *tensors)
    ctx.numbers = [None if isinstance(argument, Tensor) else argument for argument in inputs]
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_out: Tensor, _: None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    call = Call(*(number if tensor is None else tensor for tensor, number in zip(tensors, ctx.numbers, strict=True)))
    wanted = call.bias is not None and ctx.needs_input_grad[3]
    grad_q, grad_k, grad_v, grad_bias = attention_backward_op(grad_out, out, lse, wanted, *call)
    packed = call.k is None
    gradients = grad_q, None if packed else grad_k, None if packed else grad_v, grad_bias if wanted else None
    return *gradients, *[None] * (len(call) - 4)


ARGUMENTS = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? seed, float dropout, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "float? scale=None, bool causal=False"
)
attention_op = register_op(f"attention({ARGUMENTS}) -> (Tensor out, Tensor lse)", launch_forward, fake_forward)
attention_backward_op = register_op(
    f"attention_backward(Tensor grad_out, Tensor out, Tensor lse, bool bias_needs_it, {ARGUMENTS}) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)",
    launch_gradients,
    fake_gradients,
)
register_gradient(attention_op, attention_backward_op, setup_context, backward)
