from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit_kernels.checks import check_device, check_floating, check_parameter
from fastvit_kernels.patch_embed import reference


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    pos_embed: Tensor | None = None,
    cls_token: Tensor | None = None,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Cuts images into P x P patches, projects each to D numbers, adds class token and position embedding.

    Args:
        images: uint8 [B, H, W, 3] or [B, 3, H, W], normalised here as (x / 255 - mean) / std in float32; or floating
            [B, 3, H, W], taken as normalised already. P must divide H and W.
        weight, bias: [D, 3, P, P] and [D], as in a Conv2d of stride P; any floating dtype.
        pos_embed: [1, N, D] for N = (H / P) * (W / P) patches, row by row; [1, 1 + N, D] with a class token, whose
            row is the first, as in timm.
        cls_token: [1, 1, D].
        mean, std: of the three channels, for pixels scaled to [0, 1].

    Returns [B, N, D], or [B, 1 + N, D] with the class token first, in the dtype of weight. Raises ValueError for a
    wrong shape or device and TypeError for a wrong dtype. Source: Dosovitskiy et al. 2021, equation 1.
    """
    check_floating("weight", weight)
    if weight.ndim != 4 or weight.shape[1] != 3 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must have shape [D, 3, P, P], got {list(weight.shape)}")
    embed_dim, patch = weight.shape[0], weight.shape[-1]
    check_parameter("bias", bias, [embed_dim], like=weight)
    check_device("images", images, like=weight)
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean and std must have one number for each of 3 channels, got {mean} and {std}")
    images = channels_first(images)
    height, width = images.shape[2:]
    if height % patch or width % patch:
        raise ValueError(f"images of {height} x {width} pixels cannot be cut into patches of {patch} x {patch}")
    tokens = (height // patch) * (width // patch)
    if cls_token is not None:
        check_parameter("cls_token", cls_token, [1, 1, embed_dim], like=weight)
        tokens += 1
    if pos_embed is not None:
        check_parameter("pos_embed", pos_embed, [1, tokens, embed_dim], like=weight)
    return reference.patch_embed(images, weight, bias, pos_embed, cls_token, mean, std)


def channels_first(images: Tensor) -> Tensor:
    """A [B, 3, H, W] view of the images, after checking their dtype and layout."""
    if images.dtype != torch.uint8:
        check_floating("images (unless uint8)", images)
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape [B, 3, H, W] when floating point, got {list(images.shape)}")
        return images
    if images.ndim != 4 or (images.shape[1] == 3) == (images.shape[3] == 3):
        raise ValueError(f"images must have shape [B, H, W, 3] or [B, 3, H, W], got {list(images.shape)}")
    return images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
