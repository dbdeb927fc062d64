"""Softmax and sigmoid cross-entropy in plain PyTorch: the CPU path and the oracle."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    labels_b: Tensor | None,
    mix_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    logits = widen(logits)
    target = targets(logits, labels, labels_b, mix_weight, label_smoothing)
    # not log_softmax: its backward sums the target one class after the other, and what rounds off a smoothed
    # target of thousands of classes adds up
    largest = logits.detach().amax(dim=-1, keepdim=True)  # [B, 1]
    shifted = logits - largest
    log_sum = shifted.logsumexp(dim=-1, keepdim=True)  # [B, 1]
    losses = (target * (log_sum - shifted)).sum(dim=-1)  # [B]
    return losses + z_loss * (largest + log_sum).squeeze(-1).square() if z_loss else losses


def sigmoid_cross_entropy(
    logits: Tensor, labels: Tensor, labels_b: Tensor | None, mix_weight: Tensor | None, label_smoothing: float
) -> Tensor:
    logits = widen(logits)
    target = targets(logits, labels, labels_b, mix_weight, label_smoothing)
    # not binary_cross_entropy_with_logits: its sums cancel where logits are near -10, as a head's bias makes them
    return -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).sum(dim=-1)  # [B]


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it already is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def targets(
    logits: Tensor, labels: Tensor, labels_b: Tensor | None, mix_weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """The dense target of each class, mixed and smoothed: [B, C] in the dtype of `logits`."""
    target = dense(labels, logits)
    if labels_b is not None and mix_weight is not None:
        share = mix_weight.to(logits.dtype)[:, None]  # [B, 1]
        target = share * target + (1 - share) * dense(labels_b, logits)
    return (1 - label_smoothing) * target + label_smoothing / logits.shape[1]


def dense(labels: Tensor, logits: Tensor) -> Tensor:
    """Class indices [B] as one-hot rows, soft labels [B, C] as they are, in the dtype of `logits`."""
    if labels.ndim == 2:
        return labels.to(logits.dtype)
    return torch.zeros_like(logits).scatter_(1, labels[:, None], 1.0)
