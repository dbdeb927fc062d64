"""The patches of a hybrid (Dosovitskiy et al. 2021, section 3.1): cells of the map that a ResNet makes of an image."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvit_engine.config.model_shape import Shape
from fastvit_engine.models.convolutions import HYBRID, HybridBackbone, Stem, init_convolutions
from fastvit_engine.models.initial import lecun_normal_
from fastvit_kernels.patch_embed.op import channels_first
from fastvit_kernels.patch_embed.reference import normalise, prefix_tokens


class HybridEmbed(nn.Module):
    """Images to tokens through a ResNet, as `FusedPatchEmbed` is called. Parameters: backbone.*, proj.* of timm.

    The ResNet sees all of an image, so that no patch can be left out: `keep_indices` must be None.
    """

    def __init__(self, shape: Shape, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        assert shape.resnet is not None
        self.mean, self.std, self.patch_size = tuple(mean), tuple(std), shape.patch_size
        self.backbone = HybridBackbone(shape.resnet) if shape.resnet.stages else Stem(shape.resnet, HYBRID)
        channels, cells, _ = shape.patch_inputs
        self.proj = nn.Conv2d(channels, shape.width, cells, cells)

    def forward(
        self,
        images: Tensor,
        pos_embed: Tensor | None = None,
        cls_token: Tensor | None = None,
        register_tokens: Tensor | None = None,
        keep_indices: Tensor | None = None,
    ) -> Tensor:
        if keep_indices is not None:
            raise ValueError("a hybrid has no patches of pixels to leave out: keep_indices must be None")
        pixels = channels_first(images)
        height, width = pixels.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"images of {height} x {width} pixels are no multiples of {self.patch_size}")
        if pixels.dtype == torch.uint8:
            pixels = normalise(pixels, self.mean, self.std)
        dtype = self.proj.weight.dtype
        tokens = self.proj(self.backbone(pixels.to(dtype))).flatten(2).transpose(1, 2).to(dtype)  # [B, N, D]
        if pos_embed is not None:
            tokens = tokens + pos_embed[:, int(cls_token is not None) :]
        prefix = prefix_tokens(pos_embed, cls_token, register_tokens)
        return torch.cat([*(token.expand(len(tokens), -1, -1) for token in prefix), tokens], dim=1)

    @torch.no_grad()
    def init_weights(self) -> None:
        init_convolutions(self.backbone)
        lecun_normal_(self.proj.weight)
        assert self.proj.bias is not None
        nn.init.zeros_(self.proj.bias)
