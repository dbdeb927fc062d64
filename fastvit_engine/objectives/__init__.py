"""What training minimises (`train.objective`): from a batch of images to a loss for each sample."""

from fastvit_engine.objectives.build import build_objective, find_objective
from fastvit_engine.objectives.masks import corrupt_patches
from fastvit_engine.objectives.own import import_path
from fastvit_engine.objectives.protocol import Objective, ObjectiveFactory, Phased, Taught
from fastvit_engine.objectives.targets import mae_targets, masked_patch_targets

__all__ = [
    "Objective",
    "ObjectiveFactory",
    "Phased",
    "Taught",
    "build_objective",
    "corrupt_patches",
    "find_objective",
    "import_path",
    "mae_targets",
    "masked_patch_targets",
]
