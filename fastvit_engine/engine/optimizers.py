"""The optimizers a run may choose (`optimizer.kind`), their parameter groups, and the ZeRO stages they can do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastvit_engine.config import Config, OptimizerConfig
from fastvit_engine.errors import UserError

ParameterGroups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerKind:
    """One value of `optimizer.kind`."""

    build: Callable[[ParameterGroups, OptimizerConfig, bool], Optimizer]  # the last argument: on a GPU, not offloaded
    stages: frozenset[int]  # ZeRO stages whose flat partitions the update is right on


def _adamw(groups: ParameterGroups, settings: OptimizerConfig, fused: bool) -> Optimizer:
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=fused)


KINDS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw, frozenset({0, 1, 2, 3})),
}


def build_optimizer(model: nn.Module, config: Config, *, on_gpu: bool) -> Optimizer:
    """The optimizer of a configuration over the parameters of `model`."""
    groups = parameter_groups(model, config.optimizer.weight_decay)
    fused = on_gpu and config.zero.offload == "none"
    return KINDS[config.optimizer.kind].build(groups, config.optimizer, fused)


def possible_stages(config: Config) -> frozenset[int]:
    """The ZeRO stages that the optimizer and the offloading of a configuration work at."""
    by_offload = {"none": {0, 1, 2, 3}, "optimizer": {1, 2, 3}, "all": {3}}[config.zero.offload]
    return KINDS[config.optimizer.kind].stages & by_offload


def check_stage(config: Config) -> None:
    """Raises UserError if the optimizer cannot do the ZeRO stage that the configuration asks for."""
    kind, stage = config.optimizer.kind, config.zero.stage
    stages = KINDS[kind].stages
    if stage != "auto" and stage not in stages:
        possible = ", ".join(map(str, sorted(stages)))
        raise UserError(
            f"optimizer.kind = {kind} does not work at zero.stage = {stage}, only at {possible}: change one of the two"
        )
    if not possible_stages(config):
        raise UserError(
            f"optimizer.kind = {kind} does not work with zero.offload = {config.zero.offload}: change one of the two"
        )


def parameter_groups(model: nn.Module, weight_decay: float) -> ParameterGroups:
    """Decays the matrices of dense layers and the patch projection, as the paper's code does.

    Biases, LayerNorm, LayerScale, position embedding and class token are not decayed.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith(".weight") and parameter.ndim >= 2
        (decayed if is_matrix else spared).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
