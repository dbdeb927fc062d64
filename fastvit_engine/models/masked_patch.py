"""The model of masked patch prediction (Dosovitskiy et al. 2021, arXiv:2010.11929, appendix B.1.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvit_engine.config import MaskedPatchConfig, ModelConfig
from fastvit_engine.config.model_shape import predicted_numbers
from fastvit_engine.models.corruption import corrupted
from fastvit_engine.models.positions import added_positions
from fastvit_engine.models.vit import VisionTransformer, init_linear


class MaskedPatchPredictor(VisionTransformer):
    """A Vision Transformer that predicts patches of which it sees something else, or nothing.

    It has the parameters of a VisionTransformer without a head, under the same names. `mask_token` and `decoder.*`, one
    linear layer, are for pretraining alone.
    """

    def __init__(
        self, config: ModelConfig, masked_patch: MaskedPatchConfig, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(config, mean=mean, std=std)
        width = self.shape.width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder = nn.Linear(width, predicted_numbers(self.shape, masked_patch))

    def forward(  # type: ignore[override]
        self, images: Tensor, kind: Tensor | None = None, source: Tensor | None = None, chosen: Tensor | None = None
    ) -> Tensor:
        """Predictions for the chosen patches [B, M, outputs], in the order of `chosen`.

        kind, source, chosen: see `Corruption`. Without them, what a VisionTransformer returns: the representation.
        """
        if kind is None or source is None or chosen is None:
            return super().forward(images)
        embeddings = self.patch_embed(images)  # positions come after the corruption
        positions = added_positions(self._tables(images), self.config, self.shape)
        patches = self._with_prefix(corrupted(embeddings, self.mask_token, kind, source), positions.at_input)
        tokens = self.norm(self.blocks(self.pos_drop(patches), positions=positions.later))
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        prediction: Tensor = self.decoder(tokens[rows, self.shape.prefix + chosen])
        return prediction

    def _with_prefix(self, patches: Tensor, positions: Tensor | None) -> Tensor:
        """The patches with their positions, behind the class token and the registers, if there are some.

        positions: as `patch_embed` takes them.
        """
        first: Tensor | None = self.cls_token
        if positions is not None:
            patches = patches + positions[:, -patches.shape[1] :]
            first = None if first is None else first + positions[:, :1]
        prefix = [token for token in (first, self.reg_token) if token is not None]
        return torch.cat([*(token.expand(len(patches), -1, -1) for token in prefix), patches], dim=1)

    @torch.no_grad()
    def init_weights(self) -> None:
        """As a VisionTransformer, with a decoder that is Xavier uniform."""
        super().init_weights()
        nn.init.normal_(self.mask_token, std=0.02)
        init_linear(self.decoder, nn.init.xavier_uniform_)
