"""The optimizers a run may choose (`optimizer.kind`), their parameter groups, and the ZeRO stages they can do."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastvit_engine.config import Config, OptimizerConfig
from fastvit_engine.errors import UserError

ParameterGroups = list[dict[str, Any]]
RATE_SCALE = "learning_rate_scale"  # of a parameter group: what the learning rate of a step is multiplied by
_OF_EMBEDDING = re.compile(r"(cls_token|reg_token|mask_token|pos_embed|patch_embed)")
_OF_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class OptimizerKind:
    """One value of `optimizer.kind`."""

    build: Callable[[ParameterGroups, OptimizerConfig, bool], Optimizer]  # the last argument: on a GPU, not offloaded
    stages: frozenset[int]  # ZeRO stages whose flat partitions the update is right on
    moments: Callable[[OptimizerConfig], int]  # numbers that it keeps for each parameter
    temporaries: Callable[[OptimizerConfig], int]  # numbers per parameter that an update on a CPU makes on its way


def _adamw(groups: ParameterGroups, settings: OptimizerConfig, fused: bool) -> Optimizer:
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=fused)


def _sgd(groups: ParameterGroups, settings: OptimizerConfig, fused: bool) -> Optimizer:
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, fused=fused)


_EVERY_STAGE = frozenset({0, 1, 2, 3})
KINDS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw, _EVERY_STAGE, lambda settings: 2, lambda settings: 2),
    "sgd": OptimizerKind(
        _sgd, _EVERY_STAGE, lambda settings: int(settings.momentum > 0), lambda settings: int(settings.weight_decay > 0)
    ),
}


def build_optimizer(model: nn.Module, config: Config, *, on_gpu: bool) -> Optimizer:
    """The optimizer of a configuration over the parameters of `model` that learn."""
    groups = parameter_groups(model, config.optimizer)
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


def parameter_groups(model: nn.Module, settings: OptimizerConfig) -> ParameterGroups:
    """Groups of the parameters that learn, by weight decay and, under layer_decay, by layer.

    Decays the matrices of dense layers and the patch projection, as the paper's code does. Biases, LayerNorm,
    LayerScale, position embedding and class token are not decayed.
    """
    learning = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    last = 1 + max((layer for name, _ in learning if (layer := _layer(name)) is not None), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in learning:
        layer = _layer(name)
        distance = 0 if settings.layer_decay is None or layer is None else last - layer
        is_matrix = name.endswith(".weight") and parameter.ndim >= 2
        scale = 1.0 if settings.layer_decay is None else settings.layer_decay**distance
        group = {"params": [], "weight_decay": settings.weight_decay if is_matrix else 0.0, RATE_SCALE: scale}
        groups.setdefault((-distance, not is_matrix), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _layer(name: str) -> int | None:
    """The layer of a parameter: 0 for the embeddings, 1 for the first block; None for what follows the blocks."""
    if _OF_EMBEDDING.match(name):
        return 0
    block = _OF_BLOCK.match(name)
    return None if block is None else int(block[1]) + 1
