"""What training minimises (`train.objective`): from a batch of images to a loss for each sample."""

from fastvit_engine.objectives.build import build_objective
from fastvit_engine.objectives.protocol import Objective

__all__ = ["Objective", "build_objective"]
