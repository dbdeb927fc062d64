"""The names and shapes of a model's parameters, of this engine and of timm's code for it."""

import pytest
import torch

from fastvit_engine import build_model
from fastvit_engine.models.weights.timm_code import timm_code


def shapes_here_and_in_timm(config):
    """Two mappings of names to shapes. Skips the test if timm is not installed."""
    pytest.importorskip("timm", reason="timm is not installed")
    scope = {}
    with torch.device("meta"):
        exec(timm_code(config), scope)
        ours = build_model(config)
    return [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, scope["model"])]
