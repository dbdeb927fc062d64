"""From our configuration to a DeepSpeed engine: batch split, optimizer groups, ZeRO, precision."""

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from fastvit_engine.config import Config
from fastvit_engine.config.checks import check_zero
from fastvit_engine.config.deepspeed_section import check_deepspeed
from fastvit_engine.distributed.world import World
from fastvit_engine.errors import UserError


@dataclass(frozen=True)
class BatchSplit:
    """global batch = world size x micro-batch x accumulation steps."""

    micro_batch_size: int
    accumulation_steps: int


def split_batch(config: Config, world_size: int) -> BatchSplit:
    """How each process goes through its share of the global batch: in the fewest equal micro-batches of at most
    `train.micro_batch_size`. UserError where the global batch does not divide over the processes."""
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
    """The configuration handed to deepspeed.initialize, with the recipe's `deepspeed:` section merged last."""
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision = fp16 needs a GPU: use bf16 or fp32 on a CPU")
    check_zero(config.zero)
    check_deepspeed(config.deepspeed)
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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decays the matrices of dense layers and the patch projection; spares biases, LayerNorm, LayerScale, position
    embedding and class token, as the paper's code does."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith(".weight") and parameter.ndim >= 2
        (decayed if is_matrix else spared).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def build_engine(model: nn.Module, config: Config, split: BatchSplit, world: World) -> Any:
    """Wraps `model` in a DeepSpeed engine on this process's device. ValueError where `config` leaves the stage open."""
    if config.zero.stage == "auto":
        raise ValueError("zero.stage is still open: defaults.choose fills it in")
    written = deepspeed_config(config, split)
    deepspeed = import_deepspeed()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optimizer.weight_decay),
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=world.device.type == "cuda" and config.zero.offload == "none",
    )
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=written)
    except (ValidationError, deepspeed.DeepSpeedConfigError) as error:
        raise UserError(f"DeepSpeed refuses its configuration (section 'deepspeed'): {_one_line(error)}") from error
    _keep_fp32_gradient_norm(engine)
    return engine


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without the C++ extension it would otherwise compile for an inference collective on CPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"training needs DeepSpeed ({error}): pip install 'fastvit-engine[train]'") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def _keep_fp32_gradient_norm(engine: Any) -> None:
    """Plain fp32 training without ZeRO clips through this method, which throws the norm away: keep it instead."""
    parameters = list(engine.module.parameters())

    def clip_fp32_gradients() -> None:
        engine._global_grad_norm = nn.utils.clip_grad_norm_(parameters, engine.gradient_clipping())

    engine.clip_fp32_gradients = clip_fp32_gradients


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
