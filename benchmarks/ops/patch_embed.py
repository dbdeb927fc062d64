"""Bytes of images to tokens: normalisation, patches, projection, class token, position."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvit_kernels
from benchmarks.peers import MAX_AUTOTUNE, compiled, need, need_cuda, need_vision
from benchmarks.registry import Case, Draw, Op, Provider, Work, functional

MEAN = STD = 0.5  # of every channel


def inputs(case: Case, draw: Draw) -> dict[str, Tensor]:
    shape = case.shape
    return {
        "images": draw.integers(256, case.batch, shape.image, shape.image, 3, dtype=torch.uint8),
        "weight": draw.normal(shape.width, 3, shape.patch, shape.patch, scale=(3 * shape.patch**2) ** -0.5),
        "bias": draw.normal(shape.width, scale=0.02),
        "pos_embed": draw.normal(1, shape.tokens, shape.width, scale=0.02),
        "cls_token": draw.normal(1, 1, shape.width, scale=0.02),
    }


def work(case: Case) -> dict[str, Work]:
    shape, size = case.shape, case.dtype.itemsize
    product = 2 * case.batch * shape.patches * 3 * shape.patch**2 * shape.width
    pixels, tokens = case.batch * 3 * shape.image**2, case.rows * shape.width
    learnt = 3 * shape.patch**2 * shape.width + shape.tokens * shape.width
    work = Work(product, pixels + size * (tokens + learnt))  # images have no gradient, so both passes are one product
    return {"forward": work, "backward": work}


def normalised(images: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, W, 3] of bytes as [B, 3, H, W] in `dtype`, without tensors of constants, whose copy a host waits for."""
    wide = images.to(torch.promote_types(dtype, torch.float32))
    return ((wide / 255 - MEAN) / STD).permute(0, 3, 1, 2).to(dtype)


def assembled(patches: Tensor, pos_embed: Tensor, cls_token: Tensor) -> Tensor:
    return torch.cat([cls_token.expand(len(patches), -1, -1), patches], dim=1) + pos_embed


def plain(case: Case) -> Callable[..., Tensor]:
    """Patches cut out with unfold and multiplied, without a convolution."""
    patch = case.shape.patch

    def embed(images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, cls_token: Tensor) -> Tensor:
        columns = F.unfold(normalised(images, weight.dtype), patch, stride=patch).transpose(1, 2)  # [B, N, 3*P*P]
        return assembled(F.linear(columns, weight.flatten(1), bias), pos_embed, cls_token)

    return embed


def convolution(images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, cls_token: Tensor) -> Tensor:
    patches = F.conv2d(normalised(images, weight.dtype), weight, bias, stride=weight.shape[-1])
    return assembled(patches.flatten(2).transpose(1, 2), pos_embed, cls_token)


def ours(case: Case) -> Callable[..., Tensor]:
    return lambda **given: fastvit_kernels.patch_embed(**given, mean=(MEAN,) * 3, std=(STD,) * 3)


def timm(case: Case) -> Callable[..., Tensor]:
    shape = case.shape
    module = need_vision("timm.layers").PatchEmbed(shape.image, shape.patch, embed_dim=shape.width)
    module = module.to(case.device, case.dtype)

    def embed(images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, cls_token: Tensor) -> Tensor:
        weights = {"proj.weight": weight, "proj.bias": bias}
        patches = torch.func.functional_call(module, weights, (normalised(images, case.dtype),))
        return assembled(patches, pos_embed, cls_token)

    return embed


def flash_attn(case: Case) -> Callable[..., Tensor]:
    need_cuda(case, half=True)
    shape = case.shape
    module = need("flash_attn.layers.patch_embed").PatchEmbed(shape.image, shape.patch, embed_dim=shape.width)
    module = module.to(case.device, case.dtype)

    def embed(images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, cls_token: Tensor) -> Tensor:
        weights = {"proj.weight": weight.flatten(1), "proj.bias": bias}
        patches = torch.func.functional_call(module, weights, (normalised(images, case.dtype),))
        return assembled(patches, pos_embed, cls_token)

    return embed


PATCH_EMBED = Op(
    "patch_embed",
    "bytes of images to tokens",
    inputs,
    plain,
    work,
    providers=(
        Provider("fastvit", functional(ours)),
        Provider("eager", functional(lambda case: convolution)),
        Provider("eager, unfold", functional(plain)),
        Provider("timm", functional(timm), "timm"),
        Provider("compile", functional(lambda case: compiled(convolution)), slow=True),
        Provider("compile max-autotune", functional(lambda case: compiled(convolution, MAX_AUTOTUNE)), slow=True),
        Provider("flash-attn", functional(flash_attn), "flash-attn"),
    ),
)
