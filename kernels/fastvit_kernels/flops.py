"""FLOPs of each operator for `torch.utils.flop_counter`: as many as it counts for the same in plain PyTorch.

Those of matrix products, that is: 2 * M * K * N for [M, K] times [K, N]. The backward pass of attention has five
products, biases change nothing, and a gradient that nothing needs costs nothing. Causal attention is the exception: it
has the products of the keys that each query sees, about half of them all, while PyTorch's counter takes no notice.
"""

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastvit_kernels.attention_block import op as attention_block
from fastvit_kernels.block import op as _block  # noqa: F401, so that its operators exist
from fastvit_kernels.mlp import op as mlp
from fastvit_kernels.patch_embed.op import patch_grid
from fastvit_kernels.registration import NAMESPACE
from fastvit_kernels.swiglu import op as _swiglu  # noqa: F401, so that its operators exist

# operators that multiply no matrices; nor do their gradients
WITHOUT_PRODUCTS = ("layer_norm", "cross_entropy", "rotary_qk_norm", "split_samples", "merge_samples")
PURE_MLP = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")  # inputs of `mlp` that may have a gradient


def counts(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Registers a formula for `fastvit::<name>`: a function of some of its arguments, which are passed by name."""
    operator = getattr(getattr(torch.ops, NAMESPACE), name)
    names = [argument.name for argument in operator.default._schema.arguments]

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        def by_name(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            return formula(**dict(zip(names, args, strict=False)), **kwargs)

        register_flop_formula(operator, get_raw=True)(by_name)
        return formula

    return register


def linear(x: Tensor, weight: Tensor) -> int:
    """x [..., K], weight [N, K]; as many for the gradient of either."""
    return 2 * x.numel() * weight.shape[0]


def scores(
    q: Tensor,
    k: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    **_: Any,
) -> int:
    """One of the products of attention, q k^T: arguments of `attention_op`, q and k packed in one or not."""
    queries, keys = (q.shape[-4],) * 2 if k is None else (q.shape[-3], k.shape[-3])
    heads, width = q.shape[-2:]
    if cu_seqlens_q is None or cu_seqlens_k is None:
        pairs = len(q) * seen(queries, keys, causal)
    elif cu_seqlens_q.device.type == "meta" or isinstance(cu_seqlens_q, torch._subclasses.FakeTensor):
        pairs = (len(cu_seqlens_q) - 1) * seen(int(max_seqlen_q or 0), int(max_seqlen_k or 0), causal)  # at the most
    else:
        lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)
        pairs = sum(seen(*own, causal) for own in lengths)
    return 2 * pairs * heads * width


def seen(queries: int, keys: int, causal: bool) -> int:
    """Pairs of a query and a key that it sees; with `causal` the last query sees all, as in flash-attn."""
    if not causal:
        return queries * keys
    seeing = min(queries, keys)  # queries that see a key; the last of them sees all, the one before it one less
    return seeing * keys - seeing * (seeing - 1) // 2


@counts("attention")
def attention_flops(**call: Any) -> int:
    return 2 * scores(**call)


@counts("attention_backward")
def attention_backward_flops(**call: Any) -> int:
    return 5 * scores(**call)


@counts("attention_block")
def attention_block_flops(x: Tensor, qkv_weight: Tensor, proj_weight: Tensor, causal: bool, **_: Any) -> int:
    return linear(x, qkv_weight) + 2 * own_scores(x, causal) + linear(x, proj_weight)


@counts("attention_block_backward")
def attention_block_backward_flops(
    x: Tensor, qkv_weight: Tensor, proj_weight: Tensor, causal: bool, needed: Sequence[bool], **_: Any
) -> int:
    needs = dict(zip(attention_block.LEARNED, needed, strict=True))
    below_norm = needs["x"] or needs["norm_weight"] or needs["norm_bias"]
    below_attention = below_norm or needs["qkv_weight"] or needs["qkv_bias"]
    return (
        (needs["proj_weight"] + below_attention) * linear(x, proj_weight)
        + below_attention * 5 * own_scores(x, causal)
        + (needs["qkv_weight"] + below_norm) * linear(x, qkv_weight)
    )


def own_scores(x: Tensor, causal: bool) -> int:
    """q k^T of the tokens x [B, N, D], whatever the number of heads."""
    batch, tokens, width = x.shape
    return 2 * batch * seen(tokens, tokens, causal) * width


@counts("layer_norm_mlp")
@counts("mlp")
@counts("swiglu_mlp")
def mlp_flops(x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, **_: Any) -> int:
    tokens = x.numel() // x.shape[-1]
    return 2 * tokens * (fc1_weight.numel() + fc2_weight.numel())


@counts("layer_norm_mlp_backward")
@counts("mlp_backward")
@counts("swiglu_mlp_backward")
def mlp_backward_flops(x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, needed: Sequence[bool], **others: Any) -> int:
    learned = mlp.LEARNED if "norm_weight" in others else PURE_MLP
    needs = set(compress(learned, needed))
    below_norm = not needs.isdisjoint(("x", "norm_weight", "norm_bias"))
    below_activation = below_norm or not needs.isdisjoint(("fc1_weight", "fc1_bias"))
    tokens = x.numel() // x.shape[-1]
    first = ("fc1_weight" in needs) + below_norm
    second = ("fc2_weight" in needs) + below_activation
    return 2 * tokens * (first * fc1_weight.numel() + second * fc2_weight.numel())


@counts("transformer_block")
def block_flops(**call: Any) -> int:
    return attention_block_flops(**call) + mlp_flops(**call)


@counts("transformer_block_backward")
def block_backward_flops(needed: Sequence[bool], **call: Any) -> int:
    first = attention_block_backward_flops(needed=needed[:8], **call)
    rest = (any(needed[:8]), *needed[8:])  # x of the MLP half is the output of the attention half
    return first + mlp_backward_flops(needed=rest, norm_weight=call["norm2_weight"], **call)


@counts("patch_embed")
def patch_embed_flops(images: Tensor, weight: Tensor, keep_indices: Tensor | None, **_: Any) -> int:
    patches = patch_grid(images, weight.shape[-1])[0] if keep_indices is None else keep_indices.shape[1]
    return 2 * len(images) * patches * weight.numel()


@counts("patch_embed_backward")
def patch_embed_backward_flops(with_weight: bool, **call: Any) -> int:
    return patch_embed_flops(**call) if with_weight else 0
