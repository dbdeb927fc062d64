"""What a trained model has learned and where it looks, as the arrays that `fastvit inspect` draws."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastvit_engine.errors import UserError
from fastvit_engine.models import AnyModel, TimmModel, VisionTransformer
from fastvit_engine.models.inspect import (
    attention_rollout,
    filter_components,
    mean_attention_distance,
    pos_embed_similarity,
)

OF_WEIGHTS, OF_IMAGES = ("filters", "pos_embed"), ("attention_distance", "rollout")
FIGURES = (*OF_WEIGHTS, *OF_IMAGES)
_MAP_BYTES = 2**29  # of the attention maps, in float64, that are in memory at once

Arrays = dict[str, NDArray[np.generic]]


def with_attention(model: AnyModel) -> VisionTransformer:
    """The model. Raises UserError if it is not one of this engine's Vision Transformers."""
    if isinstance(model, TimmModel):
        raise UserError(
            f"the model is {model.config.name}, whose layers only timm knows: `fastvit inspect` draws the patches and "
            "attention of this engine's Vision Transformers"
        )
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"{model.config.name} is a ResNet, which has neither patches nor positions nor attention to look at: give "
            "a Vision Transformer"
        )
    return model


def inspect_weights(model: VisionTransformer, figures: Iterable[str] = OF_WEIGHTS) -> Arrays:
    """What `models.inspect` computes of weights.

    `filters` [K, P*P*3], `filter_variance` [K] and `filter_variance_total`, of all directions; `pos_embed_similarity`
    [N, N], of what is added to patches at the input. Raises UserError if nothing is, and if patches are of no pixels.
    """
    arrays: Arrays = {}
    if "filters" in figures:
        if model.shape.is_hybrid:
            others = ", ".join(figure for figure in FIGURES if figure != "filters")
            raise UserError(
                f"--figures filters: the patches of {model.config.name} are of the map of its ResNet, and their "
                f"filters are no pictures; there are {others}"
            )
        filters = model.patch_embed.proj.weight
        components, variances = filter_components(filters)
        arrays |= {"filters": _single(components), "filter_variance": _single(variances)}
        arrays["filter_variance_total"] = _single(filters.detach().double().var(dim=0).sum())
    if "pos_embed" in figures:
        positions = model.patch_positions()
        if positions is None:
            others = ", ".join(figure for figure in FIGURES if figure != "pos_embed")
            raise UserError(
                f"--figures pos_embed: the model adds no position to its patches (model.pos_embed = "
                f"{model.config.pos_embed}), so there is no figure of it; there are {others}"
            )
        arrays["pos_embed_similarity"] = _single(pos_embed_similarity(positions, grid_of(model)))
    return arrays


@torch.no_grad()
def inspect_images(model: VisionTransformer, images: Iterable[Tensor], figures: Iterable[str] = OF_IMAGES) -> Arrays:
    """`attention_distance` [L, H] in pixels, `rollout` [B, rows, columns], and the `images` uint8 [B, S, S, 3].

    images: batches, uint8 [B, S, S, 3]; `model` must be in eval mode. Raises UserError if there is none, or attention
    is not finite.
    """
    device, grid = next(model.parameters()).device, grid_of(model)
    patch_size, class_token = model.shape.patch_size, model.config.pool == "cls"
    distance, rollouts, seen = None, [], []
    for batch in _split(images, _images_at_once(model)):
        attention = model.attention_maps(batch.to(device))  # [L, B, H, T, T]
        if not bool(attention.isfinite().all()):
            raise UserError("the model's attention is not finite: its weights are broken, or it overflows")
        seen.append(batch.cpu().numpy())
        if "attention_distance" in figures:
            of_batch = len(batch) * mean_attention_distance(attention.cpu(), grid, patch_size)
            distance = of_batch if distance is None else distance + of_batch
        if "rollout" in figures:
            rollouts.append(_single(attention_rollout(attention.cpu(), grid, class_token=class_token)))
    if not seen:
        raise UserError("no image is usable: see what `fastvit data verify` says of the shards")
    arrays: Arrays = {"images": np.concatenate(seen)}
    if distance is not None:
        arrays["attention_distance"] = _single(distance / len(arrays["images"]))
    if rollouts:
        arrays["rollout"] = np.concatenate(rollouts)
    return arrays


def grid_of(model: VisionTransformer) -> int:
    """Rows, and columns, of the model's patches."""
    return model.config.image_size // model.shape.patch_size


def _images_at_once(model: VisionTransformer) -> int:
    maps = model.shape.depth * model.shape.heads * model.shape.tokens**2 * 8
    return max(1, _MAP_BYTES // maps)


def _split(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    for batch in batches:
        yield from batch.split(size)


def _single(values: Tensor) -> NDArray[np.generic]:
    array: NDArray[np.generic] = values.float().cpu().numpy()
    return array
