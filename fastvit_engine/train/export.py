"""The trained weights as safetensors files with timm's names, at the end of a run."""

import json
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fastvit_engine.config import Config
from fastvit_engine.errors import UserError
from fastvit_engine.observe.run_folder import RunFolder, atomic_write
from fastvit_engine.train.distributed import World
from fastvit_engine.train.ema import WeightAverage


def export_weights(engine: Any, ema: WeightAverage | None, config: Config, run: RunFolder, world: World) -> None:
    """Writes `model.safetensors` (fp32 master weights) and, with an average, `model_ema.safetensors`; collective."""
    files = {"model.safetensors": _master_weights(engine)}
    if ema is not None:
        with ema.applied():
            files["model_ema.safetensors"] = _computing_weights(engine)
    error = None
    if world.is_main:
        metadata = {"format": "pt", "model": json.dumps(config.model.model_dump(mode="json"))}
        try:
            for name, weights in files.items():
                atomic_write(run.path / name, to_safetensors(weights, metadata=metadata))
        except OSError as failure:
            error = UserError(
                f"{run.path / name} could not be written ({failure}): make room and run the same command again"
            )
    world.agree(error)


def _master_weights(engine: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter)  # None where no fp32 copy exists beside the parameter
        weights[name] = (parameter if master is None else master).detach().float().cpu().clone()
    return weights


def _computing_weights(engine: Any) -> dict[str, Tensor]:
    import deepspeed

    weights = {}
    for name, parameter in engine.module.named_parameters():
        is_sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_sharded), torch.no_grad():
            weights[name] = parameter.detach().float().cpu().clone()
    return weights
