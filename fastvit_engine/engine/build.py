"""From a configuration to an engine: how the batch is split, and what DeepSpeed is told about ZeRO and precision."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastvit_engine.config import Config
from fastvit_engine.config.checks import check_zero
from fastvit_engine.config.deepspeed_section import check_deepspeed
from fastvit_engine.distributed.world import World
from fastvit_engine.engine.deepspeed import initialize
from fastvit_engine.engine.optimizers import build_optimizer, check_stage
from fastvit_engine.engine.protocol import TrainingEngine
from fastvit_engine.errors import UserError


@dataclass(frozen=True)
class BatchSplit:
    """global batch = world size x micro-batch x accumulation steps."""

    micro_batch_size: int
    accumulation_steps: int


def split_batch(config: Config, world_size: int) -> BatchSplit:
    """Cuts each process's share of the global batch into the fewest equal micro-batches.

    None is larger than `train.micro_batch_size`. Raises UserError if the global batch does not divide over the
    processes.
    """
    total = config.train.global_batch_size
    if total % world_size:
        raise UserError(
            f"train.global_batch_size = {total} does not divide over {world_size} processes: "
            f"choose a multiple of {world_size}"
        )
    share = total // world_size
    largest = min(config.train.micro_batch_size or share, share)
    micro = next(size for size in range(largest, 0, -1) if share % size == 0)
    return BatchSplit(micro_batch_size=micro, accumulation_steps=share // micro)


def deepspeed_config(config: Config, split: BatchSplit) -> dict[str, Any]:
    """What DeepSpeed is configured with; the recipe's `deepspeed:` section is merged last.

    Raises UserError for combinations that DeepSpeed would ignore or fail on later.
    """
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision = fp16 needs a GPU: use bf16 or fp32 on a CPU")
    check_stage(config)
    check_zero(config.zero)
    check_deepspeed(config)
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.zero.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    written: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": split.micro_batch_size,
        "gradient_accumulation_steps": split.accumulation_steps,
        # An unreachable limit instead of none: DeepSpeed computes the gradient norm only when it clips.
        "gradient_clipping": config.train.grad_clip or 1e30,
        "zero_optimization": zero,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "fp16": {"enabled": config.train.precision == "fp16"},
        "steps_per_print": None,
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.train.precision != "fp32" and config.zero.stage != 0:
        written["data_types"] = {"grad_accum_dtype": "fp32"}  # low-precision sums drift as accumulation grows
    return _merge(written, config.deepspeed)


def build_engine(model: nn.Module, config: Config, split: BatchSplit, world: World) -> TrainingEngine:
    """An engine that trains `model` on this process's device. Raises ValueError if `config` leaves the stage open."""
    if config.zero.stage == "auto":
        raise ValueError("zero.stage is still open: defaults.choose fills it in")
    settings = deepspeed_config(config, split)
    optimizer = build_optimizer(model, config, on_gpu=world.device.type == "cuda")
    return initialize(model, optimizer, settings)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged
