"""What a Vision Transformer has learned, as numbers: the definitions behind figures 6 and 7 of Dosovitskiy et al. 2021.

Every function takes tensors or arrays, and computes in float64.
"""

from typing import Any

import torch
from torch import Tensor

COMPONENTS = 28  # that figure 7 shows

Grid = int | tuple[int, int]  # rows and columns of patches; one number: as many of both


def filter_components(weight: Any, count: int = COMPONENTS) -> tuple[Tensor, Tensor]:
    """Principal components of the patch filters: [K, P*P*3] in order P, P, 3, and the variance of each [K].

    weight: of the patch embedding [D, 3, P, P]. The D filters are the samples, and their mean is taken off. K is
    `count`, or the number of directions that D filters of this size can have. Components have norm 1, and their largest
    entry is positive; variances are over D - 1, as numpy.cov.
    """
    filters = _double(weight)
    rows = filters.permute(0, 2, 3, 1).flatten(1)  # [D, P*P*3]
    if len(rows) < 2:
        raise ValueError("one filter has no variance: a patch embedding of width 1")
    centred = rows - rows.mean(dim=0)
    _, spread, directions = torch.linalg.svd(centred, full_matrices=False)
    kept = min(count, len(rows) - 1, rows.shape[1])
    directions = directions[:kept]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return directions * largest.sign(), spread[:kept] ** 2 / (len(rows) - 1)


def pos_embed_similarity(pos_embed: Any, grid: Grid) -> Tensor:
    """Cosine similarity of the position embeddings of patches, by row of the grid: [N, N].

    pos_embed: [1, T, D] or [T, D], of which the last N rows are those of patches. A row of zeros is similar to none.
    """
    table = _double(pos_embed)
    if table.ndim == 3 and len(table) != 1:
        raise ValueError(f"pos_embed holds {len(table)} tables, one for each layer: give one of them")
    patches = table.reshape(-1, table.shape[-1])[-_patches(grid) :]
    patches = patches / patches.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return patches @ patches.T


def patch_distances(grid: Grid, patch_size: int) -> Tensor:
    """Distances between the centres of patches in pixels [N, N]."""
    rows, columns = _rows_and_columns(grid)
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()  # [N, 2]
    return patch_size * torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


def mean_attention_distance(attention: Any, grid: Grid, patch_size: int) -> Tensor:
    """How far a head looks: [L, B, H, T, T] -> [L, H], in pixels.

    The distance from a patch to every other, weighted by attention, and its mean over the patches and images. Class
    token and registers are left out, of queries and of keys, and what is left of a row sums to 1 again.
    """
    maps = _double(attention)
    patches = maps[..., -_patches(grid) :, -_patches(grid) :]
    patches = patches / patches.sum(dim=-1, keepdim=True)
    return (patches * patch_distances(grid, patch_size)).sum(dim=-1).mean(dim=(1, 3))


def attention_rollout(attention: Any, grid: Grid, *, class_token: bool | None = None) -> Tensor:
    """How much of each patch arrives at the output (Abnar and Zuidema 2020): [L, B, H, T, T] -> [B, rows, columns].

    In each layer the mean over heads, plus the identity for the residual connection, with rows that sum to 1; these
    are multiplied from the first layer to the last. Read are the patches' columns of the class token's row; without a
    class token, of the mean over the patches' rows, as they are averaged. class_token: None means that there is one if
    there are more tokens than patches.
    """
    layers = _double(attention).mean(dim=2)  # [L, B, T, T]
    tokens = layers.shape[-1]
    layers = layers + torch.eye(tokens, dtype=torch.float64, device=layers.device)
    layers = layers / layers.sum(dim=-1, keepdim=True)
    rollout = layers[0]
    for layer in layers[1:]:
        rollout = layer @ rollout
    patches = _patches(grid)
    has_class_token = tokens > patches if class_token is None else class_token
    row = rollout[:, 0] if has_class_token else rollout[:, -patches:].mean(dim=1)  # [B, T]
    return row[:, -patches:].unflatten(1, _rows_and_columns(grid))


def _rows_and_columns(grid: Grid) -> tuple[int, int]:
    return (grid, grid) if isinstance(grid, int) else (grid[0], grid[1])


def _patches(grid: Grid) -> int:
    rows, columns = _rows_and_columns(grid)
    return rows * columns


def _double(values: Any) -> Tensor:
    return torch.as_tensor(values).detach().double()
