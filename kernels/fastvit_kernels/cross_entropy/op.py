from typing import Literal

import torch
from torch import Tensor

from fastvit_kernels.checks import check_device, check_floating, check_rate
from fastvit_kernels.cross_entropy import reference

Reduction = Literal["mean", "none"]


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    labels_b: Tensor | None = None,
    mix_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Softmax cross-entropy -sum_c t_c log softmax(logits)_c, computed in float32.

    The target t is the label, one-hot or soft; with `labels_b` the mixup pair mix_weight * labels +
    (1 - mix_weight) * labels_b (Zhang et al. 2018); then smoothed as (1 - s) * t + s / C for s = `label_smoothing`.

    Args:
        logits: [B, C], any floating dtype, finite.
        labels: class indices int64 [B], or soft labels of any floating dtype [B, C]. Labels get no gradient.
        labels_b, mix_weight: the second labels of the pair, of the same kind as `labels`, and the share of the first
            ones, floating [B]; both or neither.
        reduction: "mean" over the batch, or "none".

    Returns a float32 scalar, or [B] for "none" (float64 if the logits are). Raises ValueError for a wrong shape,
    device or rate and TypeError for a wrong dtype. An index outside 0..C-1 is a ValueError on the CPU; on a GPU
    reading the labels back would stall the stream at every step, so there such an index trips a device-side assertion.
    """
    check_arguments(logits, labels, labels_b, mix_weight, label_smoothing, reduction)
    return reduce(reference.cross_entropy(logits, labels, labels_b, mix_weight, label_smoothing), reduction)


def sigmoid_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    labels_b: Tensor | None = None,
    mix_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Binary cross-entropy of every class, -t_c log sigmoid(x_c) - (1 - t_c) log sigmoid(-x_c), summed over classes.

    The loss of Vision Transformers on ImageNet-21k and JFT. Arguments, target, result and errors are those of
    `cross_entropy`; soft labels may be multi-hot and need not sum to 1. The mean is over the batch, not over classes.
    """
    check_arguments(logits, labels, labels_b, mix_weight, label_smoothing, reduction)
    return reduce(reference.sigmoid_cross_entropy(logits, labels, labels_b, mix_weight, label_smoothing), reduction)


def reduce(losses: Tensor, reduction: Reduction) -> Tensor:
    return losses.mean() if reduction == "mean" else losses


def check_arguments(
    logits: Tensor,
    labels: Tensor,
    labels_b: Tensor | None,
    mix_weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
) -> None:
    check_floating("logits", logits)
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape [B, C], got {list(logits.shape)}")
    check_labels("labels", labels, logits)
    if (labels_b is None) != (mix_weight is None):
        raise ValueError("labels_b and mix_weight must be given together")
    if labels_b is not None and mix_weight is not None:
        check_labels("labels_b", labels_b, logits)
        if labels_b.ndim != labels.ndim:
            raise ValueError("labels and labels_b must both be class indices or both be soft labels")
        check_floating("mix_weight", mix_weight)
        if mix_weight.shape != labels.shape[:1]:
            raise ValueError(f"mix_weight must have shape {list(labels.shape[:1])}, got {list(mix_weight.shape)}")
        check_device("mix_weight", mix_weight, like=logits)
    check_rate("label_smoothing", label_smoothing)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")


def check_labels(name: str, labels: Tensor, logits: Tensor) -> None:
    batch, classes = logits.shape
    if labels.dtype == torch.int64:
        expected = [batch]
    elif labels.is_floating_point():
        expected = [batch, classes]
    else:
        raise TypeError(f"{name} must be int64 class indices or floating soft labels, got {labels.dtype}")
    if list(labels.shape) != expected:
        raise ValueError(f"{name} of {labels.dtype} must have shape {expected}, got {list(labels.shape)}")
    check_device(name, labels, like=logits)
    if labels.dtype == torch.int64 and labels.device.type == "cpu" and batch:
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high >= classes:
            raise ValueError(f"{name} must lie in 0..{classes - 1}, got values from {low} to {high}")
