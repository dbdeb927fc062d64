"""The model of MoCo v3 (Chen et al. 2021, arXiv:2104.02057): a Vision Transformer that tells images apart."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_engine.config import MocoConfig, ModelConfig
from fastvit_engine.models.batch_norm import BatchNorm, Sum
from fastvit_engine.models.vit import VisionTransformer

VIEWS = 2


class Contrastive(VisionTransformer):
    """A Vision Transformer with a projection, and a predictor of the other view's projection.

    It has the parameters of a VisionTransformer without a head, under the same names. `projection.*` and `predictor.*`
    are for pretraining alone. Student and teacher are this model with the weights and with their average.
    """

    def __init__(self, config: ModelConfig, moco: MocoConfig, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(config, mean=mean, std=std)
        hidden, outputs = moco.hidden_width, moco.outputs
        self.projection = NormalisedMlp(self.shape.width, hidden, hidden, outputs)
        self.predictor = NormalisedMlp(outputs, hidden, outputs)
        self.patch_embed.requires_grad_(not moco.frozen_patches)

    def forward(  # type: ignore[override]
        self, images: Tensor, *, counted: Tensor | None = None, add_up: Sum | None = None, predict: bool = False
    ) -> Tensor:
        """Projections of two views of B images, first all of one and then all of the other: float32 [2, B, K].

        They have length 1. counted: floating [B], 1 for images that count and 0 for others. predict: their
        predictions instead. Without `counted`, what a VisionTransformer returns: the representation of images [B, D].
        """
        if counted is None or add_up is None:
            return super().forward(images)
        of_views = self.represent(images).unflatten(0, (VIEWS, -1))  # [2, B, D]
        counted = counted.float()[:, None]
        projected = self.projection(of_views, counted, add_up)
        return F.normalize((self.predictor(projected, counted, add_up) if predict else projected).float(), dim=-1)

    @torch.no_grad()
    def init_weights(self) -> None:
        """As a VisionTransformer, with patches Xavier uniform and the other layers as those of torch.nn.Linear."""
        super().init_weights()
        weight = self.patch_embed.proj.weight  # [D, 3, P, P]
        bound = math.sqrt(6 / (weight[0].numel() + len(weight)))
        nn.init.uniform_(weight, -bound, bound)
        for mlp in (self.projection, self.predictor):
            mlp.init_weights()


class NormalisedMlp(nn.Module):
    """Linear layers, a batch normalisation after each, and ReLU between them: [V, B, widths[0]] -> [V, B, widths[-1]].

    The last normalisation has neither weights nor biases, and the layers have no biases.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs, bias=False) for inputs, outputs in pairwise(widths))
        self.norms = nn.ModuleList(
            BatchNorm(width, affine=number < len(widths) - 1) for number, width in enumerate(widths[1:], start=1)
        )

    def forward(self, x: Tensor, counted: Tensor, add_up: Sum) -> Tensor:
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True), start=1):
            x = norm(layer(x), counted, add_up)
            x = F.relu(x) if number < len(self.layers) else x
        return x

    def init_weights(self) -> None:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            assert isinstance(layer, nn.Linear) and isinstance(norm, BatchNorm)
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound)
            if norm.weight is not None and norm.bias is not None:
                nn.init.ones_(norm.weight)
                nn.init.zeros_(norm.bias)
