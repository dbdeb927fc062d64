"""The tail of a residual half-block: dropout, LayerScale and stochastic depth of the branch, then the addition."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels import transforms
from fastvit_kernels.checks import check_rate
from fastvit_kernels.registration import register_composite


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


def rows_of_sample(rows: int, path_scale: Tensor | None) -> int:
    """How many of the rows of a matrix belong to each sample of path_scale [B]; 0 if there are none, or no scale."""
    return 0 if path_scale is None or rows == 0 else rows // path_scale.shape[0]


def add_scaled(x: Tensor, branch: Tensor, layer_scale: Tensor | None, path_scale: Tensor | None) -> Tensor:
    """x + path_scale * layer_scale * branch, with x and branch [B, ..., D], layer_scale [D] and path_scale [B]."""
    if layer_scale is not None:
        branch = branch * layer_scale.to(branch.dtype)
    if path_scale is not None:
        branch = branch * path_scale.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))
    return x + branch


def kept_samples(batch: int, drop_path: float) -> int:
    """How many of `batch` samples `drop_path_subset` computes."""
    return max(1, round(batch * (1 - drop_path)))


def drop_path_subset(
    half_block: Callable[..., Tensor],
    x: Tensor,
    *,
    layer_scale: Tensor | None = None,
    drop_path: float,
    outputs: int | None = None,
) -> Tensor:
    """Stochastic depth that skips the dropped samples instead of masking them (Oquab et al. 2024, section 5).

    The half-block is computed for max(1, round(B * (1 - drop_path))) of the B samples, drawn at random, and the others
    pass unchanged. Branches are scaled by B over the number computed, so that the expectation does not change. How many
    are dropped does not vary from call to call, unlike with a mask.

    Args:
        half_block: called once, as half_block(x, layer_scale=...); say `attention_block` or `layer_norm_mlp` with all
            other arguments filled in by functools.partial, `drop_path` left at 0.
        x: [B, N, D], any floating dtype.
        layer_scale: [D], the dtype of x or float32; None leaves it out.
        drop_path: share of the samples to drop, at least 0 and below 1.
        outputs: how many tokens the half-block gives back, the first ones; None: all N.

    Returns [B, N, D], or [B, outputs, D], in the dtype of x. Raises ValueError for a wrong rate, and what the
    half-block raises.
    """
    check_rate("drop_path", drop_path)
    batch = x.shape[0]
    kept = kept_samples(batch, drop_path)
    if kept >= batch:
        return half_block(x, layer_scale=layer_scale)
    # half-blocks add the residual themselves: what scales their branch is LayerScale
    if layer_scale is None:
        layer_scale = x.new_ones(x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    layer_scale = layer_scale.to(torch.promote_types(layer_scale.dtype, torch.float32)) * (batch / kept)
    order = torch.randperm(batch, device=x.device)
    if transforms.obstacle():  # the operators have a gradient only
        computed, passed = split_samples(x, order, kept)
        changed = half_block(computed, layer_scale=layer_scale)
        return torch.cat([changed, passed[:, :outputs]]).index_select(0, order.argsort())
    computed, passed = split_samples_op(x, order, kept)
    return merge_samples_op(half_block(computed, layer_scale=layer_scale), passed[:, :outputs], order)


# Each of the next two operators is the gradient of the other, and reads and writes every sample once. Indexing x twice
# would have PyTorch fill gradients with zeros and add them up, about twice the traffic.


def split_samples(x: Tensor, order: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Samples of x [B, ...] in a given order [B], as two parts: [kept, ...] and [B - kept, ...]."""
    return x.index_select(0, order[:kept]), x.index_select(0, order[kept:])


def merge_samples(first: Tensor, second: Tensor, order: Tensor) -> Tensor:
    """The inverse of `split_samples`."""
    x, kept = first.new_empty(order.shape + first.shape[1:]), first.shape[0]
    return x.index_copy_(0, order[:kept], first).index_copy_(0, order[kept:], second)


def split_gradient(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    return merge_samples_op(*gradients, *ctx.saved_tensors), None, None


def merge_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *split_samples_op(gradient, *ctx.saved_tensors, ctx.kept), None


def split_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1])


def merge_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.kept = inputs[0].shape[0]
    ctx.save_for_backward(inputs[2])


split_samples_op = register_composite(
    "split_samples(Tensor x, Tensor order, SymInt kept) -> (Tensor first, Tensor second)",
    split_samples,
    split_context,
    split_gradient,
)
merge_samples_op = register_composite(
    "merge_samples(Tensor first, Tensor second, Tensor order) -> Tensor x", merge_samples, merge_context, merge_gradient
)
