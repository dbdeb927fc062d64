"""The model of DINO (Caron et al. 2021, arXiv:2104.14294): a Vision Transformer that compares views with prototypes."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_engine.config import DinoConfig, ModelConfig
from fastvit_engine.models.positions import resampled
from fastvit_engine.models.vit import VisionTransformer


class SelfDistilled(VisionTransformer):
    """A Vision Transformer with a projection to prototypes, for views of several sizes.

    It has the parameters of a VisionTransformer without a head, under the same names. `projection.*` is for pretraining
    alone, as is the centre. Student and teacher are this model with the weights and with their average.
    """

    centre_bits: Tensor

    def __init__(self, config: ModelConfig, dino: DinoConfig, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(config, mean=mean, std=std)
        self.projection = Projection(self.shape.width, dino)
        # The bits of float32 numbers, as integers: what converts a model to 16 bits leaves these alone.
        self.register_buffer("centre_bits", torch.zeros(dino.prototypes, dtype=torch.int32))

    @property
    def centre(self) -> Tensor:
        """The moving mean of the teacher's scores, float32 [K]: writing to it changes the model."""
        return self.centre_bits.view(torch.float32)

    def forward(  # type: ignore[override]
        self, images: Tensor, *smaller: Tensor, project: bool = False
    ) -> Tensor:
        """Scores of the images, and then of the smaller ones, for the prototypes: [V, K], between -1 and 1.

        smaller: batches of images of another size each, for which the position table is resampled. Without `project`,
        what a VisionTransformer returns: the representation of the images [B, D].
        """
        if not project:
            return super().forward(images)
        scores: Tensor = self.projection(torch.cat([self.represent(views) for views in (images, *smaller)]))
        return scores

    def _tables(self, images: Tensor) -> Tensor | None:
        """The position tables for images of any size, see `resampled`."""
        tables = super()._tables(images)
        return None if tables is None else resampled(tables, self.shape, self.side(images))

    @torch.no_grad()
    def init_weights(self) -> None:
        """As a VisionTransformer, with the projection as DINO's authors set it.

        Its layers are drawn from a normal, cut off at two deviations, of 0.02 at the authors' width of 2048 and of more
        for fewer numbers: with 0.02 the output of a narrow projection is so short that the first updates of the biases
        outweigh it, and all images get one answer. Prototypes, as those of a linear layer, are uniform. Their length
        has no effect on scores, but on how fast they turn.
        """
        super().init_weights()
        deviation = 0.02 * (2048 / self.projection.width) ** 0.5
        for parameter in self.projection.mlp.parameters():
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=deviation, a=-2 * deviation, b=2 * deviation)
        bound = self.projection.prototypes.weight.shape[1] ** -0.5
        nn.init.uniform_(self.projection.prototypes.weight, -bound, bound)
        self.centre_bits.zero_()


class Projection(nn.Module):
    """Three layers with GELU to a narrow vector of length 1, and its products with prototypes: [B, D] -> [B, K]."""

    def __init__(self, width: int, dino: DinoConfig) -> None:
        super().__init__()
        self.width = dino.projection_width
        sizes = [width, dino.projection_width, dino.projection_width, dino.bottleneck]
        first, second, third = (nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes))
        self.mlp = nn.Sequential(first, nn.GELU(), second, nn.GELU(), third)
        self.prototypes = Prototypes(dino.bottleneck, dino.prototypes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.prototypes(F.normalize(self.mlp(x).float(), dim=-1).to(x.dtype))
        return scores


class Prototypes(nn.Module):
    """Holds K directions, rows of weight [K, W] that are used with length 1."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight.float(), dim=-1).to(x.dtype))
