"""The tail of a residual half-block: dropout, LayerScale and stochastic depth of the branch, then the addition."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_branch(x: Tensor, branch: Tensor, *, layer_scale: Tensor | None, dropout: float, drop_path: float) -> Tensor:
    """x + drop_path(layer_scale * dropout(branch)), with x and branch [B, ..., D] and layer_scale [D].

    Rates are active whenever they are above 0.
    """
    if dropout > 0:
        branch = F.dropout(branch, dropout)
    return add_scaled(x, branch, layer_scale, draw_path_scale(branch, drop_path))


def draw_path_scale(branch: Tensor, drop_path: float) -> Tensor | None:
    """Stochastic depth (Huang et al. 2016) for branch [B, ..., D]: what each sample's branch is multiplied by, [B].

    A branch is dropped, 0, with chance `drop_path` and else scaled by 1 / (1 - drop_path), so that the expectation does
    not change. Float32; None for a rate of 0.
    """
    if drop_path == 0:
        return None
    keep = 1 - drop_path
    return torch.empty(branch.shape[0], dtype=torch.float32, device=branch.device).bernoulli_(keep) / keep


def add_scaled(x: Tensor, branch: Tensor, layer_scale: Tensor | None, path_scale: Tensor | None) -> Tensor:
    """x + path_scale * layer_scale * branch, with x and branch [B, ..., D], layer_scale [D] and path_scale [B]."""
    if layer_scale is not None:
        branch = branch * layer_scale.to(branch.dtype)
    if path_scale is not None:
        branch = branch * path_scale.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))
    return x + branch
