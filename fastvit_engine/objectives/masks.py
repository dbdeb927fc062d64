"""Which patches of an image are hidden: drawn from the seed of each sample, whatever batch and process it is in."""

import numpy as np
import torch
from torch import Tensor

from fastvit_engine.config.model_shape import masked_count
from fastvit_engine.data.pixels.draws import on_device, uniforms
from fastvit_engine.models.corruption import Corruption, corrupted

# of `uniforms`; others are in data/pixels/
_STREAM_OF_ORDER, _STREAM_OF_CORRUPTION, _STREAM_OF_DROPPED = 2000, 3000, 5000
_REPLACED, _EXCHANGED = 0.8, 0.1  # of the chosen patches; the others stay as they are


def draw_order(seeds: np.ndarray, patches: int) -> np.ndarray:
    """A random order of the patches of each image: int64 [B, N] for int64 seeds [B]."""
    return _order(seeds, patches, _STREAM_OF_ORDER)


def draw_visible(seeds: np.ndarray, patches: int, visible: int) -> np.ndarray:
    """Which patches of each image stay if the others are dropped: int64 [B, visible], rising, for int64 seeds [B]."""
    return np.sort(_order(seeds, patches, _STREAM_OF_DROPPED)[:, :visible], axis=1)


def _order(seeds: np.ndarray, patches: int, stream: int) -> np.ndarray:
    return np.argsort(uniforms(seeds, patches, stream=stream), axis=1, kind="stable")


def draw_corruption(seeds: np.ndarray, patches: int, ratio: float, device: torch.device) -> Corruption:
    """As `corrupt_patches` draws it, from int64 seeds [B]."""
    drawn = uniforms(seeds, 3 * patches, stream=_STREAM_OF_CORRUPTION).reshape(len(seeds), 3, patches)
    return _corruption(on_device(drawn, device), ratio)


def corrupt_patches(
    embeddings: Tensor, mask_token: Tensor, generator: torch.Generator, ratio: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Corrupts patch embeddings as appendix B.1.2 of Dosovitskiy et al. 2021 does.

    Args:
        embeddings: [B, N, D], before the position embedding is added.
        mask_token: [D], or any shape that broadcasts to the embeddings.
        generator: on the device of the embeddings.
        ratio: round(ratio N) patches of each image are chosen. Each of them is replaced by the mask token (kind 1) with
            a probability of 0.8, by another patch of the same image (kind 2) with 0.1, and kept (kind 3) with 0.1.

    Returns the embeddings and the kinds, int8 [B, N], 0 for a patch that is not chosen. Raises ValueError if an image
    has a single patch.
    """
    batch, patches, _ = embeddings.shape
    drawn = torch.rand((batch, 3, patches), generator=generator, dtype=torch.float64, device=embeddings.device)
    corruption = _corruption(drawn, ratio)
    return corrupted(embeddings, mask_token, corruption.kind, corruption.source), corruption.kind


def _corruption(drawn: Tensor, ratio: float) -> Corruption:
    """drawn: uniform float64 [B, 3, N]: which patches are chosen, what happens to each, and which other it gets."""
    patches = drawn.shape[2]
    if patches < 2:
        raise ValueError("an image of one patch has no other patch to take: use smaller patches")
    rank, fate, other = drawn.unbind(1)
    chosen = rank.argsort(dim=1, stable=True)[:, : masked_count(patches, ratio)].sort(dim=1).values
    is_chosen = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, chosen, True)
    kind = 1 + (fate >= _REPLACED).to(torch.int8) + (fate >= _REPLACED + _EXCHANGED).to(torch.int8)
    kind = torch.where(is_chosen, kind, 0)
    own = torch.arange(patches, device=drawn.device)
    distance = 1 + (other * (patches - 1)).long().clamp(max=patches - 2)
    return Corruption(kind, torch.where(kind == 2, (own + distance) % patches, own), chosen)
