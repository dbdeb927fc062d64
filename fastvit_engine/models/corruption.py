"""Patch embeddings that are hidden from the model or exchanged, for masked patch prediction."""

from typing import NamedTuple

import torch
from torch import Tensor


class Corruption(NamedTuple):
    """What happens to each patch of each image."""

    kind: Tensor  # int8 [B, N]: 0 not chosen, 1 mask token, 2 another patch of the same image, 3 chosen but unchanged
    source: Tensor  # int64 [B, N]: the patch whose embedding is taken; the patch itself unless its kind is 2
    chosen: Tensor  # int64 [B, M]: the patches of kinds 1 to 3, in rising order


def corrupted(embeddings: Tensor, mask_token: Tensor, kind: Tensor, source: Tensor) -> Tensor:
    """The embeddings [B, N, D] after a corruption, in their dtype."""
    rows = torch.arange(len(embeddings), device=embeddings.device)[:, None]
    taken = embeddings[rows, source]  # whose gradient is summed in a fixed order, on a GPU too
    return torch.where((kind == 1)[..., None], mask_token.to(taken.dtype), taken)
