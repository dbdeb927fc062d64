"""Attention of packed q, k and v: what lies between two linear layers."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention as flex

import fastvit_kernels
from benchmarks.peers import MAX_AUTOTUNE, compiled, need, need_cuda
from benchmarks.registry import Case, Draw, Op, Provider, Unusable, Work, functional


def inputs(case: Case, draw: Draw) -> dict[str, Tensor]:
    return {"qkv": draw.normal(case.batch, case.shape.tokens, 3, case.shape.heads, case.shape.head_dim)}


def work(case: Case) -> dict[str, Work]:
    shape, size = case.shape, case.dtype.itemsize
    product = 2 * case.batch * shape.heads * shape.tokens**2 * shape.head_dim
    part = case.rows * shape.width * size  # bytes of q, of k, ...
    forward = Work(2 * product, 4 * part)
    backward = Work(5 * product, 8 * part)  # reads qkv, the output and its gradient, writes three gradients
    return {"forward": forward, "backward": backward}


def plain(case: Case) -> Callable[[Tensor], Tensor]:
    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, d] each
        scores = q @ k.transpose(-2, -1) * case.shape.head_dim**-0.5
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)  # [B, N, D]

    return attend


def sdpa(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def forced(backend: SDPBackend) -> Callable[[Case], Callable[[Tensor], Tensor]]:
    """`scaled_dot_product_attention` by this backend, or an error: never by another one."""

    def make(case: Case) -> Callable[[Tensor], Tensor]:
        if backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            need_cuda(case, half=backend == SDPBackend.CUDNN_ATTENTION)

        def attend(qkv: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(qkv)

        return attend

    return make


def flash_attn_2(case: Case) -> Callable[[Tensor], Tensor]:
    need_cuda(case, half=True)
    attend = need("flash_attn").flash_attn_qkvpacked_func
    return lambda qkv: attend(qkv).flatten(-2)


def flash_attn_3(case: Case) -> Callable[[Tensor], Tensor]:
    need_cuda(case, half=True)
    attend = need("flash_attn_interface").flash_attn_func
    return lambda qkv: first(attend(*qkv.unbind(2))).flatten(-2)


def flash_attn_4(case: Case) -> Callable[[Tensor], Tensor]:
    need_cuda(case, half=True)
    attend = need("flash_attn.cute").flash_attn_func
    return lambda qkv: first(attend(*qkv.unbind(2))).flatten(-2)


def xformers(case: Case) -> Callable[[Tensor], Tensor]:
    need_cuda(case)
    attend = need("xformers.ops").memory_efficient_attention
    return lambda qkv: attend(*qkv.unbind(2)).flatten(-2)


def transformer_engine(case: Case) -> Callable[[Tensor], Tensor]:
    need_cuda(case, half=True)
    engine = need("transformer_engine.pytorch")
    module = engine.DotProductAttention(
        case.shape.heads, case.shape.head_dim, qkv_format="bshd", attn_mask_type="no_mask"
    )
    return lambda qkv: module(*qkv.unbind(2))


def flex_attention(case: Case) -> Callable[[Tensor], Tensor]:
    if case.device.type != "cuda":
        raise Unusable("needs a GPU")
    attend = compiled(flex)
    return lambda qkv: attend(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(-2)


def first(result: Any) -> Tensor:
    """Some versions return the logarithm of the softmax's sum too."""
    return result[0] if isinstance(result, tuple) else result


ATTENTION = Op(
    "attention",
    "attention",
    inputs,
    plain,
    work,
    providers=(
        Provider("fastvit", functional(lambda case: fastvit_kernels.attention)),
        Provider("eager", functional(plain)),
        Provider("sdpa", functional(lambda case: sdpa)),
        Provider("sdpa cudnn", functional(forced(SDPBackend.CUDNN_ATTENTION))),
        Provider("sdpa flash", functional(forced(SDPBackend.FLASH_ATTENTION))),
        Provider("sdpa efficient", functional(forced(SDPBackend.EFFICIENT_ATTENTION))),
        Provider("sdpa math", functional(forced(SDPBackend.MATH))),
        Provider("compile", functional(lambda case: compiled(plain(case))), slow=True),
        Provider("compile max-autotune", functional(lambda case: compiled(plain(case), MAX_AUTOTUNE)), slow=True),
        Provider("flex_attention", functional(flex_attention), slow=True),
        Provider("flash-attn 2", functional(flash_attn_2), "flash-attn"),
        Provider("flash-attn 3", functional(flash_attn_3), "flash-attn-3"),
        Provider("flash-attn 4", functional(flash_attn_4), "flash-attn-4"),
        Provider("xformers", functional(xformers), "xformers"),
        Provider("transformer_engine", functional(transformer_engine), "transformer-engine"),
    ),
)
