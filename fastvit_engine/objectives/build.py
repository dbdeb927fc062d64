"""The objectives by name, and how a run builds its own."""

import inspect
from collections.abc import Mapping

import torch
from torch import nn

from fastvit_engine.config import Config
from fastvit_engine.errors import UserError
from fastvit_engine.objectives.classify import Classify
from fastvit_engine.objectives.dino import SelfDistillation
from fastvit_engine.objectives.mae import MaskedAutoencoding
from fastvit_engine.objectives.masked_patch import MaskedPatchPrediction
from fastvit_engine.objectives.moco import MomentumContrast
from fastvit_engine.objectives.own import import_factory
from fastvit_engine.objectives.protocol import Objective, ObjectiveFactory

OBJECTIVES: Mapping[str, ObjectiveFactory] = {
    "classify": Classify,
    "dino": SelfDistillation,
    "mae": MaskedAutoencoding,
    "masked_patch": MaskedPatchPrediction,
    "moco": MomentumContrast,
}


def find_objective(name: str) -> ObjectiveFactory:
    """What builds the objective that `train.objective` names; imports the module of one's own, or raises UserError."""
    return OBJECTIVES[name] if name in OBJECTIVES else import_factory(name)


def build_objective(config: Config, device: torch.device, factory: ObjectiveFactory | None = None) -> Objective:
    """The objective that `train.objective` names, or that `factory` builds.

    Raises UserError if it takes other arguments, computes no losses, or has parameters that nothing would train.
    """
    factory = factory or find_objective(config.train.objective)
    _check_arguments(factory, config, device)
    objective = factory(config, device)
    if not callable(getattr(objective, "losses", None)):
        raise UserError(
            f"the objective {config.train.objective} is {objective!r}, which has no method losses(model, batch): add it"
        )
    for part in (objective, *getattr(objective, "__dict__", {}).values()):
        if isinstance(part, nn.Module) and any(parameter.requires_grad for parameter in part.parameters()):
            raise UserError(
                f"the objective {config.train.objective} has parameters of its own (in {type(part).__name__}), which "
                "would be neither trained nor saved, since only the model is: freeze them with requires_grad_(False)"
            )
    return objective


def _check_arguments(factory: ObjectiveFactory, config: Config, device: torch.device) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # of a builtin, which does not tell
        return
    try:
        signature.bind(config, device)
    except TypeError as error:
        raise UserError(
            f"the objective {config.train.objective} takes {signature}, and is called with a Config and a device "
            f"({error}): change its arguments"
        ) from None
