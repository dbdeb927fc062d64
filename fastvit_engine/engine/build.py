"""From a configuration to an engine: what DeepSpeed is told about the batch, ZeRO and precision."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastvit_engine.config import Config
from fastvit_engine.config.checks import check_zero
from fastvit_engine.config.deepspeed_section import check_deepspeed
from fastvit_engine.data.stream.batch_split import BatchSplit
from fastvit_engine.distributed.world import World
from fastvit_engine.engine.deepspeed import initialize
from fastvit_engine.engine.optimizers.kinds import build_optimizer
from fastvit_engine.engine.protocol import TrainingEngine
from fastvit_engine.errors import UserError


def deepspeed_config(config: Config, split: BatchSplit, *, on_gpu: bool | None = None) -> dict[str, Any]:
    """What DeepSpeed is configured with; the recipe's `deepspeed:` section is merged last.

    on_gpu: whether processes have a GPU each; None: if this machine has one. Raises UserError for combinations that
    DeepSpeed would ignore or fail on later.
    """
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    if config.train.precision == "fp16" and not on_gpu:
        raise UserError("train.precision = fp16 needs a GPU: use bf16 or fp32 on a CPU")
    if config.train.precision == "fp8" and not on_gpu and not config.train.fp8.emulate:
        raise UserError(
            "train.precision = fp8 needs a Hopper GPU or a later one: use bf16 on a CPU, or set train.fp8.emulate=true "
            "to compute it in plain PyTorch, slower than bf16"
        )
    check_zero(config.zero)
    check_deepspeed(config)
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if config.zero.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    # If the global batch does not divide, their product with the processes, DeepSpeed's batch, is more than the global
    # batch. DeepSpeed only counts with it; `BatchSplit.loss_scale` makes the gradients right.
    written: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": split.micro_batch_size,
        "gradient_accumulation_steps": split.accumulation_steps,
        # An unreachable limit instead of none: DeepSpeed computes the gradient norm only when it clips.
        "gradient_clipping": config.train.grad_clip or 1e30,
        "zero_optimization": zero,
        "bf16": {"enabled": config.train.number_format == "bf16"},
        "fp16": {"enabled": config.train.number_format == "fp16"},
        "steps_per_print": None,
        # By default it waits for the GPU before and after every pass. The engine has clocks of its own.
        "timers": {"throughput": {"enabled": False}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # its list knows none but Adam's: ours know what ZeRO gives them
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
