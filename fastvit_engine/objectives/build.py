"""The objectives by name."""

from collections.abc import Callable

import torch

from fastvit_engine.config import Config
from fastvit_engine.objectives.classify import Classify
from fastvit_engine.objectives.protocol import Objective

OBJECTIVES: dict[str, Callable[[Config, torch.device], Objective]] = {"classify": Classify}


def build_objective(config: Config, device: torch.device) -> Objective:
    """The objective that `train.objective` names."""
    return OBJECTIVES[config.train.objective](config, device)
