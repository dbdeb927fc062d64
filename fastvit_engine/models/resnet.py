"""The ResNet-v2 of BiT (Kolesnikov et al. 2020, arXiv:1912.11370), under the parameter names of timm."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvit_engine.config import ModelConfig
from fastvit_engine.errors import UserError
from fastvit_engine.models.convolutions import BIT, Norm, Stem, init_convolutions, stages_of
from fastvit_engine.models.image_model import ImageModel
from fastvit_kernels.patch_embed.op import channels_first
from fastvit_kernels.patch_embed.reference import normalise


class ResNet(ImageModel):
    """Images to logits: convolutions with GroupNorm and standardised weights, mean of the last map, linear head.

    The cells of the last map stand where a Transformer has tokens: N of them, row by row. Images may have any size.
    Parameters: stem.*, stages.*, norm.*, head.fc.*.
    """

    of_classifier = ("head.fc.weight",)

    def __init__(self, config: ModelConfig, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(config, mean, std)
        shape = self.shape
        assert shape.resnet is not None and not shape.is_transformer
        self.stem = Stem(shape.resnet, BIT)
        self.stages = stages_of(shape.resnet, BIT)
        self.norm = Norm(shape.width, BIT)
        self.head = ConvHead(shape.width, config.num_classes) if config.num_classes else nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        """The normalised cells of the last map, after the ReLU [B, N, D]."""
        return self._map(images).flatten(2).transpose(1, 2)

    def represent(self, images: Tensor) -> Tensor:
        """What the head sees of images [B, D]: the mean of the last map."""
        return self._map(images).mean(dim=(2, 3))

    def forward_head(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> logits [B, C]; without a head, [B, D]."""
        logits: Tensor = self.head(tokens.mean(dim=1))
        return logits

    def attention_maps(self, images: Tensor) -> Tensor:
        """Raises UserError: there is no attention."""
        raise UserError(f"{self.config.name} is a ResNet, which has no attention to look at: give a Vision Transformer")

    def _map(self, images: Tensor) -> Tensor:
        pixels = channels_first(images)
        if pixels.dtype == torch.uint8:
            pixels = normalise(pixels, self.pixel_mean, self.pixel_std)
        last: Tensor = self.norm(self.stages(self.stem(pixels.to(self.norm.weight.dtype))))  # [B, D, h, w]
        return last

    @torch.no_grad()
    def init_weights(self) -> None:
        """Sets every parameter as the authors' code does: the head is zero, so that the first loss is known.

        Whole parameters must be in memory: under ZeRO-3, call it inside deepspeed.zero.GatheredParameters.
        """
        init_convolutions(self)
        if isinstance(self.head, ConvHead):
            nn.init.zeros_(self.head.fc.weight)
            assert self.head.fc.bias is not None
            nn.init.constant_(self.head.fc.bias, self.config.head_bias)


class ConvHead(nn.Module):
    """A linear layer as timm has it in a ResNet-v2, a convolution: [B, D] -> [B, C]; fc.weight [C, D, 1, 1]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x[:, :, None, None]).flatten(1)
        return logits
