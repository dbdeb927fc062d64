"""The optimizers a run may choose (`optimizer.kind`), and how much memory they need."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from fastvit_engine.config import Config, OptimizerConfig
from fastvit_engine.engine.optimizers.adafactor import Adafactor
from fastvit_engine.engine.optimizers.apex import build_apex, check_apex
from fastvit_engine.engine.optimizers.batches import BATCH
from fastvit_engine.engine.optimizers.groups import Apart, ParameterGroups, none_apart, parameter_groups
from fastvit_engine.engine.optimizers.lamb import Lamb
from fastvit_engine.engine.optimizers.lion import Lion
from fastvit_engine.engine.optimizers.muon import ROUND, Muon
from fastvit_engine.engine.optimizers.state import is_factored, is_hidden_matrix


@dataclass(frozen=True)
class OptimizerKind:
    """One value of `optimizer.kind`, which works at every ZeRO stage."""

    build: Callable[[ParameterGroups, OptimizerConfig], Optimizer]
    # Bytes that an update needs on its way: by the elements of the largest tensor that the optimizer is given, and of
    # all together. None: fused kernels, for GPUs and CPUs, that need no such bytes.
    scratch_bytes: Callable[[OptimizerConfig, int, int], int] | None
    apart: Apart = none_apart  # the parameters for which it keeps other state than for the rest


def _adamw(groups: ParameterGroups, settings: OptimizerConfig) -> Optimizer:
    """Fused: on a CPU, PyTorch's other way takes ten times as long for the flat tensors that ZeRO gives it."""
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True)


def _sgd(groups: ParameterGroups, settings: OptimizerConfig) -> Optimizer:
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, fused=True)


def _lion(groups: ParameterGroups, settings: OptimizerConfig) -> Optimizer:
    return Lion(groups, settings.learning_rate, settings.betas)


def _muon(groups: ParameterGroups, settings: OptimizerConfig) -> Optimizer:
    return Muon(groups, settings.learning_rate, settings.momentum, settings.betas, settings.eps)


def _lamb(groups: ParameterGroups, settings: OptimizerConfig) -> Optimizer:
    return Lamb(groups, settings.learning_rate, settings.betas, settings.eps)


def _adafactor(groups: ParameterGroups, settings: OptimizerConfig) -> Optimizer:
    return Adafactor(groups, settings.learning_rate, settings.betas, settings.eps)


def _batches(numbers: int) -> Callable[[OptimizerConfig, int, int], int]:
    """As `scratch_bytes`: so many fp32 numbers for each element of a batch."""
    return lambda settings, largest, total: 4 * numbers * min(total, BATCH)


def updates_in_place(settings: OptimizerConfig, *, on_gpu: bool) -> bool:
    """Whether fused kernels do the update, which need no bytes on its way."""
    return KINDS[settings.kind].scratch_bytes is None or (on_gpu and settings.kernels == "apex")


KINDS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw, None),
    "sgd": OptimizerKind(_sgd, None),
    "lion": OptimizerKind(_lion, _batches(1)),
    # Besides AdamW's part: bf16 matrices that are collected, returned, and multiplied.
    "muon": OptimizerKind(_muon, lambda settings, largest, total: 8 * min(total, ROUND), apart=is_hidden_matrix),
    "lamb": OptimizerKind(_lamb, _batches(2)),
    "adafactor": OptimizerKind(_adafactor, _batches(4), apart=is_factored),
}


def build_optimizer(model: nn.Module, config: Config, *, on_gpu: bool) -> Optimizer:
    """The optimizer of a configuration over the parameters of `model` that learn.

    Raises UserError if it asks for kernels that cannot be used here.
    """
    kind = KINDS[config.optimizer.kind]
    check_apex(config, on_gpu=on_gpu)
    groups = parameter_groups(model, config.optimizer, kind.apart)
    if config.optimizer.kernels == "apex":
        return build_apex(groups, config.optimizer)
    return kind.build(groups, config.optimizer)
