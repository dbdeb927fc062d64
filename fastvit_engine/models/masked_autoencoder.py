"""The masked autoencoder of He et al. 2022 (arXiv:2111.06377): an encoder of some patches, a decoder of the others."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastvit_engine.config import MaeConfig, ModelConfig
from fastvit_engine.config.model_shape import Shape
from fastvit_engine.models.positions import sincos_positions
from fastvit_engine.models.vit import Blocks, VisionTransformer, init_linear
from fastvit_kernels import FusedBlock, FusedLayerNorm

MLP_RATIO = 4  # of the decoder


class MaskedAutoencoder(VisionTransformer):
    """A Vision Transformer with what predicts the pixels of patches that it has not seen.

    The encoder has the parameters of a VisionTransformer without a head, under the same names. `mask_token` and
    `decoder.*` are for pretraining alone.
    """

    def __init__(self, config: ModelConfig, mae: MaeConfig, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(config, mean=mean, std=std)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, mae.decoder_width))
        self.decoder = Decoder(self.shape, config, mae)

    def forward(  # type: ignore[override]
        self, images: Tensor, visible: Tensor | None = None, masked: Tensor | None = None
    ) -> Tensor:
        """The pixels of the masked patches, normalised patch by patch: [B, M, P * P * 3], see `mae_targets`.

        visible, masked: int64 [B, K] and [B, M], which patches of each image the encoder sees, and which the decoder
        predicts, in this order. Without them, what a VisionTransformer returns: the representation [B, D].
        """
        if visible is None or masked is None:
            return super().forward(images)
        tokens = self._encode(images, visible)
        prediction: Tensor = self.decoder(tokens, self.mask_token, visible, masked)
        return prediction

    @torch.no_grad()
    def init_weights(self) -> None:
        """As a VisionTransformer, with the decoder's own dense kernels Xavier uniform too."""
        super().init_weights()
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder.init_weights()


class Decoder(nn.Module):
    """A narrower Vision Transformer over the encoder's tokens and a mask token for each patch that is to be predicted.

    Parameters: embed.*, pos_embed [1, N, W] (fixed sines and cosines), blocks.*, norm.*, head.*.
    """

    def __init__(self, encoder: Shape, config: ModelConfig, mae: MaeConfig) -> None:
        super().__init__()
        width = mae.decoder_width
        self.shape = replace(encoder, width=width, positions=encoder.patches)
        self.embed = nn.Linear(encoder.width, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, encoder.patches, width), requires_grad=False)
        self.blocks = Blocks(
            *(
                FusedBlock(
                    width,
                    mae.decoder_heads,
                    MLP_RATIO * width,
                    activation=config.activation,
                    eps=config.layer_norm_eps,
                )
                for _ in range(mae.decoder_depth)
            )
        )
        self.norm = FusedLayerNorm(width, config.layer_norm_eps)
        self.head = nn.Linear(width, 3 * encoder.patch_size**2)

    def forward(self, tokens: Tensor, mask_token: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """tokens [B, prefix + K, D] of the encoder -> [B, M, P * P * 3].

        Blocks know no order of tokens: the masked ones come first, so that the last block can compute them alone.
        """
        tokens, prefix, positions = self.embed(tokens), self.shape.prefix, self.pos_embed[0]
        hidden = mask_token + positions[masked]
        seen = tokens[:, prefix:] + positions[visible]
        decoded = self.blocks(torch.cat([hidden, seen, tokens[:, :prefix]], dim=1), outputs=masked.shape[1])
        pixels: Tensor = self.head(self.norm(decoded))
        return pixels

    @torch.no_grad()
    def init_weights(self) -> None:
        """Of all but the blocks and the norm, which whoever holds the decoder sets."""
        self.pos_embed.copy_(sincos_positions(self.shape))
        for linear in (self.embed, self.head):
            init_linear(linear, nn.init.xavier_uniform_)
