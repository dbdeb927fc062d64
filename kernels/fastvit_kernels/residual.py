"""The tail of a residual half-block: dropout, LayerScale and stochastic depth of the branch, then the addition."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_branch(x: Tensor, branch: Tensor, *, layer_scale: Tensor | None, dropout: float, drop_path: float) -> Tensor:
    """x + drop_path(layer_scale * dropout(branch)), with x and branch [B, N, D] and layer_scale [D].

    Stochastic depth (Huang et al. 2016) keeps the whole branch of a sample or drops it, and scales kept branches by
    1 / (1 - drop_path), so the expectation does not change. Rates are active whenever they are above 0.
    """
    if dropout > 0:
        branch = F.dropout(branch, dropout)
    if layer_scale is not None:
        branch = branch * layer_scale.to(branch.dtype)
    if drop_path > 0:
        keep = 1 - drop_path
        kept = torch.empty(x.shape[0], 1, 1, dtype=branch.dtype, device=x.device).bernoulli_(keep)  # [B, 1, 1]
        branch = branch * (kept / keep)
    return x + branch
