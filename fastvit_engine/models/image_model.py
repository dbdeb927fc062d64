"""What all models have in common, Vision Transformers and ResNets: how they are called, frozen and described."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastvit_engine.config import EvalTransform, ModelConfig
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_kernels import FusedBlock
from fastvit_kernels.mlp.op import Recompute


class ImageModel(nn.Module):
    """Images to logits: a backbone gives the representation of an image, and `head`, a linear layer, the logits.

    Images are uint8 [B, H, W, 3] or [B, 3, H, W], normalised inside with `mean` and `std` of pixels in [0, 1], or
    floating [B, 3, H, W] that already are. A kind of model defines `represent`, `forward_features`, `forward_head` and
    `init_weights`.
    """

    head: nn.Module
    of_classifier: tuple[str, ...] = ("head.weight",)  # what optimizer.head_weight_decay is for
    backbone_frozen = False  # by `freeze_backbone`

    # How evaluation crops images, as data.eval_crop and data.eval_transform say it; None: nobody has said it.
    eval_crop: float | None = None
    eval_transform: EvalTransform | None = None
    class_names: tuple[str, ...] | None = None  # in the order of the outputs; None: not known

    def __init__(self, config: ModelConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.config, self.shape = config, resolve_shape(config)
        self.pixel_mean, self.pixel_std = tuple(mean), tuple(std)

    def forward_features(self, images: Tensor) -> Tensor:
        """What the backbone gives before pooling [B, N, D]."""
        raise NotImplementedError

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Logits [B, C] of what `forward_features` gives; without a head, its representation [B, D]."""
        raise NotImplementedError

    def represent(self, images: Tensor) -> Tensor:
        """What the head sees of images [B, D]."""
        raise NotImplementedError

    def attention_maps(self, images: Tensor) -> Tensor:
        """The attention probabilities of every block, query by key: float32 [L, B, H, N, N], for inspection."""
        raise NotImplementedError

    def patch_positions(self) -> Tensor | None:
        """What is added to the patches at the input of the first block [N, D], row by row; None: nothing is."""
        return None

    def init_weights(self) -> None:
        """Sets every parameter as the authors' code does."""
        raise NotImplementedError

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits [B, C]. args, kwargs: further arguments of `represent`, if this kind of model has any."""
        if not self.backbone_frozen:
            return self.head(self.represent(images, *args, **kwargs))
        with torch.no_grad():
            represented = self.represent(images, *args, **kwargs)
        return self.head(represented)

    def recompute(self, mode: Recompute) -> None:
        """Sets what the backward pass of every block computes again instead of keeping it, see FusedBlock."""
        for block in self.modules():
            if isinstance(block, FusedBlock):
                block.recompute = mode

    def freeze_backbone(self) -> None:
        """From now on only `head` learns: all else gets no gradient, and computes as in evaluation, without dropout."""
        self.backbone_frozen = True
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.backbone_frozen:
            for part in self.children():
                part.train(mode and part is self.head)
        return self
