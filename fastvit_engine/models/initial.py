"""Distributions that weights are drawn from, which PyTorch does not have."""

import math

from torch import Tensor, nn


def lecun_normal_(weight: Tensor) -> None:
    """Variance 1 / fan_in, drawn from a normal cut off at two of its own standard deviations."""
    cut_std = 0.87962566103423978  # of a standard normal cut off at +-2
    std = 1 / math.sqrt(weight[0].numel()) / cut_std
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
