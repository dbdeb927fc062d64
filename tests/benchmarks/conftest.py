from dataclasses import replace

import pytest
import torch

from benchmarks.ops.layer_norm import LAYER_NORM
from benchmarks.registry import Case
from benchmarks.shapes import Shape

TINY = Shape("tiny/8@16", 8, 16, 32, 2, 64, 2, (2,))


@pytest.fixture
def case():
    """Layer normalisation, small, with no providers."""
    return Case(replace(LAYER_NORM, providers=()), TINY, 2, torch.float32, torch.device("cpu"))
