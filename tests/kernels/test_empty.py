"""Without samples or without tokens, every operation gives what PyTorch does: empty results, and gradients of zeros."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit_kernels as fk
from tests.in_full import IN_FULL
from tests.kernels.test_patch_embed import OURS as patch_embed
from tests.kernels.test_patch_embed import inputs as patch_inputs

pytestmark = pytest.mark.usefixtures("implementation")

D, M, HEADS = 16, 24, 2
NORM, QKV, PROJ = ((D,), (D,)), ((3 * D, D), (3 * D,)), ((D, D), (D,))
FC1, FC2, GATED = ((M, D), (M,)), ((D, M), (D,)), ((2 * M, D), (2 * M,))
ATTENTION, MLP, SWIGLU = (*NORM, *QKV, *PROJ), (*NORM, *FC1, *FC2), (*NORM, *GATED, *FC2)
BLOCK = {"heads": HEADS, "eps": 1e-6}


def scaled(operation: Callable[..., Tensor], *names: str) -> Callable[..., Tensor]:
    """With stochastic depth, and the last parameters as layer scales of these names."""
    return lambda *given: operation(
        *given[: -len(names)], **dict(zip(names, given[-len(names) :], strict=True)), drop_path=0.5
    )


def added(x: Tensor, *norm: Tensor, **options: Any) -> Tensor:
    y, normed = fk.add_layer_norm(x, 2 * x, *norm, **options)
    return y + normed


def packed(x: Tensor) -> Tensor:
    """[B, N, D] as q, k and v [B, N, 3, H, d]."""
    return torch.stack([x, 2 * x, 3 * x], dim=2).unflatten(-1, (HEADS, -1))


def rotated(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    angles = torch.zeros(x.shape[1], D // HEADS, device=x.device)
    return fk.rotary_qk_norm(packed(x), angles, angles, q_norm_weight=weight, q_norm_bias=bias)


layer_norm_mlp, layer_norm_swiglu = partial(fk.layer_norm_mlp, eps=1e-6), partial(fk.layer_norm_swiglu, eps=1e-6)
attention_block, transformer_block = partial(fk.attention_block, **BLOCK), partial(fk.transformer_block, **BLOCK)
OPERATIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "layer_norm": (fk.layer_norm, NORM),
    "add_layer_norm": (
        scaled(lambda x, *g, **o: sum(fk.add_layer_norm(x, 2 * x, *g, **o)), "layer_scale"),
        (*NORM, (D,)),
    ),
    "mlp": (fk.mlp, (*FC1, *FC2)),
    "swiglu_mlp": (fk.swiglu_mlp, (*GATED, *FC2)),
    "layer_norm_mlp": (layer_norm_mlp, MLP),
    "layer_norm_mlp, scaled": (scaled(layer_norm_mlp, "layer_scale"), (*MLP, (D,))),
    "layer_norm_swiglu": (layer_norm_swiglu, SWIGLU),
    "layer_norm_swiglu, scaled": (scaled(layer_norm_swiglu, "layer_scale"), (*SWIGLU, (D,))),
    "attention": (lambda x: fk.attention(packed(x)), ()),
    "attention_block": (attention_block, ATTENTION),
    "attention_block, scaled": (scaled(attention_block, "layer_scale"), (*ATTENTION, (D,))),
    "transformer_block": (transformer_block, (*ATTENTION, *MLP)),
    "transformer_block, scaled": (
        scaled(transformer_block, "layer_scale1", "layer_scale2"),
        (*ATTENTION, *MLP, (D,), (D,)),
    ),
    "rotary_qk_norm": (rotated, ((D // HEADS,), (D // HEADS,))),
}


@pytest.mark.parametrize("shape", [(0, 5, D), (2, 0, D)], ids=["no samples", "no tokens"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_zeros(name: str, shape: tuple[int, ...], device: torch.device) -> None:
    operation, shapes = OPERATIONS[name]
    tensors = [torch.randn(own, device=device) for own in (shape, *shapes)]
    everything = list(range(len(tensors)))
    alone = [[index] for index in everything] if IN_FULL else [everything[-1:]]
    for learned in (everything, *alone):
        inputs = [tensor.detach().requires_grad_(index in learned) for index, tensor in enumerate(tensors)]
        y = operation(*inputs)
        assert y.shape[:2] == shape[:2] and y.numel() == 0
        gradients = torch.autograd.grad(y.sum(), [inputs[index] for index in learned])
        for index, gradient in zip(learned, gradients, strict=True):
            assert gradient.shape == inputs[index].shape and not gradient.any()


def test_queries_without_keys(device: torch.device) -> None:
    q, k = (torch.randn(2, n, HEADS, 8, device=device, requires_grad=True) for n in (3, 0))
    out = fk.attention_qkv(q, k, k)
    assert out.shape == (2, 3, HEADS * 8) and not out.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), [q, k]))


@pytest.mark.parametrize("lacking", ["kept patches", "pixels"])
def test_images_without_patches_have_their_class_token(lacking: str, device: torch.device) -> None:
    tensors = patch_inputs(2, 8, 8, 4, 16)
    if lacking == "pixels":
        tensors |= {"images": tensors["images"][:, :, :0], "pos_embed": tensors["pos_embed"][:, :1]}
    tensors = {name: tensor.to(device).requires_grad_(name != "images") for name, tensor in tensors.items()}
    keep = torch.empty(2, 0, dtype=torch.int64, device=device) if lacking == "kept patches" else None
    tokens = patch_embed(**tensors, keep_indices=keep)
    first = tensors["cls_token"] + tensors["pos_embed"][:, :1]
    assert torch.equal(tokens, first.expand(2, 1, 16))
    names = [name for name in tensors if name != "images"]
    gradients = dict(zip(names, torch.autograd.grad(tokens.sum(), [tensors[name] for name in names]), strict=True))
    assert gradients["cls_token"].eq(2).all() and gradients["pos_embed"][:, 0].eq(2).all()
    assert not gradients["pos_embed"][:, 1:].any() and not gradients["weight"].any() and not gradients["bias"].any()
