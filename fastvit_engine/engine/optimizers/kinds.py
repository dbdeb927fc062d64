"""The optimizers a run may choose (`optimizer.kind`), and how much memory they need."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from fastvit_engine.config import Config, OptimizerConfig
from fastvit_engine.engine.optimizers.adafactor import Adafactor, is_factored
from fastvit_engine.engine.optimizers.batches import BATCH
from fastvit_engine.engine.optimizers.groups import (
    Apart,
    ParameterGroups,
    is_hidden_matrix,
    none_apart,
    parameter_groups,
)
from fastvit_engine.engine.optimizers.lamb import Lamb
from fastvit_engine.engine.optimizers.lion import Lion
from fastvit_engine.engine.optimizers.muon import ROUND, Muon

Shape = tuple[int, ...]


@dataclass(frozen=True)
class OptimizerKind:
    """One value of `optimizer.kind`, which works at every ZeRO stage."""

    build: Callable[[ParameterGroups, OptimizerConfig, bool], Optimizer]  # the last argument: on a GPU, not offloaded
    # Bytes of state for a parameter of this name and shape.
    state_bytes: Callable[[OptimizerConfig, str, Shape], int]
    # Bytes that an update needs on its way, without fused kernels: by the elements of the largest tensor that the
    # optimizer is given, and of all together.
    scratch_bytes: Callable[[OptimizerConfig, int, int], int]
    fused: bool = False  # whether there are kernels for GPUs that need no such bytes
    apart: Apart = none_apart  # the parameters for which it keeps other state than for the rest


def _adamw(groups: ParameterGroups, settings: OptimizerConfig, fused: bool) -> Optimizer:
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=fused)


def _sgd(groups: ParameterGroups, settings: OptimizerConfig, fused: bool) -> Optimizer:
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, fused=fused)


def _lion(groups: ParameterGroups, settings: OptimizerConfig, fused: bool) -> Optimizer:
    return Lion(groups, settings.learning_rate, settings.betas)


def _muon(groups: ParameterGroups, settings: OptimizerConfig, fused: bool) -> Optimizer:
    return Muon(groups, settings.learning_rate, settings.momentum, settings.betas, settings.eps)


def _lamb(groups: ParameterGroups, settings: OptimizerConfig, fused: bool) -> Optimizer:
    return Lamb(groups, settings.learning_rate, settings.betas, settings.eps)


def _adafactor(groups: ParameterGroups, settings: OptimizerConfig, fused: bool) -> Optimizer:
    return Adafactor(groups, settings.learning_rate, settings.betas, settings.eps)


def _fp32(numbers: int) -> Callable[[OptimizerConfig, str, Shape], int]:
    """As `state_bytes`: so many fp32 numbers for each element."""
    return lambda settings, name, shape: 4 * numbers * math.prod(shape)


def _batches(numbers: int) -> Callable[[OptimizerConfig, int, int], int]:
    """As `scratch_bytes`: so many fp32 numbers for each element of a batch."""
    return lambda settings, largest, total: 4 * numbers * min(total, BATCH)


def _muon_state(settings: OptimizerConfig, name: str, shape: Shape) -> int:
    return (4 if is_hidden_matrix(name, shape) else 8) * math.prod(shape)


def _adafactor_state(settings: OptimizerConfig, name: str, shape: Shape) -> int:
    return 2 * math.prod(shape) + 4 * (sum(shape) if is_factored(name, shape) else math.prod(shape))


KINDS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw, _fp32(2), lambda settings, largest, total: 8 * largest, fused=True),
    "sgd": OptimizerKind(
        _sgd,
        lambda settings, name, shape: 4 * math.prod(shape) * (settings.momentum > 0),
        lambda settings, largest, total: 4 * largest * (settings.weight_decay > 0),
        fused=True,
    ),
    "lion": OptimizerKind(_lion, _fp32(1), _batches(1)),
    # Besides AdamW's part: bf16 matrices that are collected, returned, and multiplied.
    "muon": OptimizerKind(
        _muon, _muon_state, lambda settings, largest, total: 8 * min(total, ROUND), apart=is_hidden_matrix
    ),
    "lamb": OptimizerKind(_lamb, _fp32(2), _batches(2)),
    "adafactor": OptimizerKind(_adafactor, _adafactor_state, _batches(4), apart=is_factored),
}


def build_optimizer(model: nn.Module, config: Config, *, on_gpu: bool) -> Optimizer:
    """The optimizer of a configuration over the parameters of `model` that learn."""
    kind = KINDS[config.optimizer.kind]
    groups = parameter_groups(model, config.optimizer, kind.apart)
    return kind.build(groups, config.optimizer, on_gpu and config.zero.offload == "none")
