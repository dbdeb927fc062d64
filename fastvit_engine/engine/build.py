"""From a configuration to an engine: how the batch is split, and what DeepSpeed is told about ZeRO and precision."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastvit_engine.config import Config
from fastvit_engine.distributed.world import World
from fastvit_engine.engine.deepspeed import initialize
from fastvit_engine.engine.optimizers import build_optimizer, check_stage
from fastvit_engine.engine.protocol import TrainingEngine
from fastvit_engine.errors import UserError

# DeepSpeed ignores top-level keys it does not know; these are the ones it reads, so that a typing error is caught.
_DEEPSPEED_KEYS = {
    "activation_checkpointing",
    "aio",
    "bf16",
    "checkpoint",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_types",
    "datastates_ckpt",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "fp16",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "tensorboard",
    "timers",
    "torch_autocast",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
}
_OWNED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "the 'optimizer' section",
    "scheduler": "the 'schedule' section",
}


@dataclass(frozen=True)
class BatchSplit:
    """global batch = world size x micro-batch x accumulation steps."""

    micro_batch_size: int
    accumulation_steps: int


def split_batch(config: Config, world_size: int) -> BatchSplit:
    """Cuts each process's share of the global batch into the fewest equal micro-batches of at most
    `train.micro_batch_size`. Raises UserError if the global batch does not divide over the processes."""
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
    if config.zero.offload != "none" and config.zero.stage == 0:
        raise UserError("zero.offload needs ZeRO: set zero.stage to 1, 2 or 3")
    if config.zero.offload == "all" and config.zero.stage != 3:
        raise UserError("zero.offload = all moves parameters to host memory, which needs zero.stage = 3")
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
    return _merge(written, _checked_section(config.deepspeed))


def build_engine(model: nn.Module, config: Config, split: BatchSplit, world: World) -> TrainingEngine:
    """An engine that trains `model` on this process's device. Raises ValueError if `config` leaves the stage open."""
    if config.zero.stage == "auto":
        raise ValueError("zero.stage is still open: defaults.choose fills it in")
    settings = deepspeed_config(config, split)
    optimizer = build_optimizer(model, config, on_gpu=world.device.type == "cuda")
    return initialize(model, optimizer, settings)


def _checked_section(section: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in section:
        if key in _OWNED_KEYS:
            raise UserError(f"deepspeed.{key} is written by the engine: set {_OWNED_KEYS[key]} instead")
        if key not in _DEEPSPEED_KEYS:
            near = difflib.get_close_matches(key, _DEEPSPEED_KEYS, n=1)
            hint = f"did you mean 'deepspeed.{near[0]}'?" if near else f"it reads {', '.join(sorted(_DEEPSPEED_KEYS))}"
            raise UserError(f"DeepSpeed does not know the key 'deepspeed.{key}'; {hint}")
    if "stage" in (section.get("zero_optimization") or {}):
        raise UserError("deepspeed.zero_optimization.stage is written by the engine: set zero.stage instead")
    return section


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged
