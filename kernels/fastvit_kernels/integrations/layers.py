"""Single layers: LayerNorm, and the convolution that embeds patches."""

from typing import Any

import torch
from torch import Tensor, nn

from fastvit_kernels.integrations.checks import autocasts, check_layer_norm, check_tensor, fits
from fastvit_kernels.integrations.fused import Fused, Reading, base_class
from fastvit_kernels.layer_norm import layer_norm
from fastvit_kernels.patch_embed import patch_embed

UNUSED = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # mean and std: images that come here are floating, normalised already


class FusedLayerNorm(Fused):
    """nn.LayerNorm and the equal classes of other libraries, by `layer_norm`."""

    @classmethod
    def reading(cls, module: nn.Module) -> Reading:
        reason = check_layer_norm("the layer", module, (base_class(module),))
        return Reading((), (reason,)) if reason else Reading(("layer_norm",), ())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        norm: Any = self
        if len(args) == 1 and not kwargs and not self.reading(self).left_alone and fits(args[0], norm.weight):
            return layer_norm(args[0], norm.weight, norm.bias, eps=norm.eps)
        return super().forward(*args, **kwargs)


class FusedPatchConv(Fused):
    """A convolution whose stride is its kernel, by `patch_embed`: [B, 3, H, W] -> [B, D, H / P, W / P]."""

    @classmethod
    def reading(cls, module: nn.Module) -> Reading:
        reason = not_patches(module)
        return Reading((), (reason,)) if reason else Reading(("patch_embed",), ())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        conv: Any = self
        if len(args) == 1 and not kwargs and not not_patches(self) and takes(args[0], conv.weight):
            images, patch = args[0], conv.weight.shape[-1]
            bias = conv.weight.new_zeros(conv.weight.shape[0]) if conv.bias is None else conv.bias
            mean, std = UNUSED
            tokens = patch_embed(images, conv.weight, bias, mean=mean, std=std)  # [B, N, D]
            grid = (images.shape[2] // patch, images.shape[3] // patch)
            result = tokens.transpose(1, 2).unflatten(2, grid)  # [B, D, H / P, W / P], channels last
            return result if channels_last(images) or channels_last(conv.weight) else result.contiguous()
        return super().forward(*args, **kwargs)


def not_patches(conv: Any) -> str:
    if conv.kernel_size != conv.stride or conv.kernel_size[0] != conv.kernel_size[1]:
        return "kernel and stride are not those of square patches"
    if conv.in_channels != 3:
        return f"{conv.in_channels} input channels, patch_embed takes 3"
    if conv.padding not in ("valid", (0, 0)) or conv.dilation != (1, 1) or conv.groups != 1:
        return "padded, dilated or grouped"
    return check_tensor("weight", conv.weight)


def channels_last(tensor: Tensor) -> bool:
    """Whether a convolution of or with this tensor returns its result channels last."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def takes(images: Any, weight: Tensor) -> bool:
    """Cropping (a size that patches do not divide), gradients of the images and autocast stay with the convolution."""
    return (
        fits(images, weight)
        and not autocasts(images.device.type)
        and images.ndim == 4
        and images.shape[1] == 3
        and images.shape[2] % weight.shape[-1] == 0
        and images.shape[3] % weight.shape[-1] == 0
        and not (images.requires_grad and torch.is_grad_enabled())
    )
