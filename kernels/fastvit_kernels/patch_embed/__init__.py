"""Images to tokens: normalisation, patch projection, class token and positions."""

from fastvit_kernels.patch_embed.op import patch_embed

__all__ = ["patch_embed"]
