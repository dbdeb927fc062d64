"""Position embeddings that are computed, not learned."""

import numpy as np
import torch
from torch import Tensor

from fastvit_engine.config.model_shape import Shape

_TEMPERATURE = 10_000.0


def sincos_positions(shape: Shape) -> Tensor:
    """Sines and cosines of the column and row of each patch, float32 [1, positions, D]; zeros for other tokens.

    As big_vision computes them, after MoCo v3 (Chen et al. 2021, arXiv:2104.02057): a quarter of the width each for
    sines and cosines of x and of y, with D / 4 frequencies from 1 to 1 / 10,000 in equal ratios. Positions count in
    patches, so another image size keeps the frequencies.
    """
    side = round(shape.patches**0.5)
    frequencies = _TEMPERATURE ** -np.linspace(0, 1, shape.width // 4)
    y, x = (index.reshape(-1, 1) * frequencies for index in np.mgrid[:side, :side])  # [patches, D / 4]
    table = np.zeros((1, shape.positions, shape.width))
    table[:, shape.positions - shape.patches :] = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return torch.from_numpy(table).float()
