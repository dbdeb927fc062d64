"""Everything about a run that can be refused before training starts, and where it will start."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvit_engine.config import Config
from fastvit_engine.data import check_data
from fastvit_engine.errors import UserError
from fastvit_engine.models import resolve_shape
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.checkpoint import latest_checkpoint, read_state
from fastvit_engine.train.engine import deepspeed_config, split_batch
from fastvit_engine.train.plan import Plan


@dataclass(frozen=True)
class Start:
    """Where a run starts: `step` of `total_steps` (equal when it is complete), from `checkpoint` if there is one."""

    step: int
    total_steps: int
    seconds: float  # training time before
    checkpoint: Path | None
    fingerprint: dict[str, Any]  # of the run, for its checkpoints
    message: str


def preflight(config: Config, run: RunFolder, world_size: int, *, resume: bool) -> Start:
    """Checks configuration, data and run folder; raises UserError for what cannot work."""
    resolve_shape(config.model)
    deepspeed_config(config, split_batch(config, world_size))
    streams = check_data(config, world_size=world_size)
    total_steps = Plan(config).total_steps
    if run.config.exists() and not resume:
        raise UserError(
            f"{run.path} already holds a run: add --resume auto to continue it, or choose another folder with --out"
        )
    _check_writable(run)
    wanted = fingerprint(config, world_size, streams.streams)
    reading = f"reading {streams.streams} data streams with {max(streams.num_workers, 1)} process(es) a rank"
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        message = f"starting {run.path}: {total_steps} steps, {reading}"
        return Start(0, total_steps, 0.0, None, wanted, message)
    state = read_state(checkpoint)
    _check_same_run(wanted, state["fingerprint"], checkpoint)
    step = state["step"]
    if step < total_steps:
        message = f"continuing {run.path} from step {step} of {total_steps}, {reading}"
    else:
        accuracy = state["accuracy"].get("eval")
        top1 = f" and top-1 {accuracy['top1']:.1%}" if accuracy else ""
        message = f"{run.path} is complete, with {step} steps{top1}: nothing to do"
    return Start(min(step, total_steps), total_steps, state["seconds"], checkpoint, wanted, message)


def fingerprint(config: Config, world_size: int, streams: int) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued: state that fits, and the same order of the data."""
    return {
        "model": config.model.model_dump(mode="json"),
        "world_size": world_size,
        "zero_stage": config.zero.stage,
        "precision": config.train.precision,
        "global_batch_size": config.train.global_batch_size,
        "ema": config.ema.decay is not None,
        "seed": config.seed,
        "data.streams": streams,
        "data.shuffle_buffer": config.data.shuffle_buffer,
    }


def _check_writable(run: RunFolder) -> None:
    probe = run.checkpoints / ".writable"
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"run folder {run.path} cannot be written ({error.strerror}): choose another one with --out"
        ) from error


def _check_same_run(wanted: dict[str, Any], saved: dict[str, Any], checkpoint: Path) -> None:
    for name, before in saved.items():
        now = wanted[name]
        if now == before:
            continue
        if name == "model":
            differing = [f"model.{key} is {now[key]!r}, was {before[key]!r}" for key in now if now[key] != before[key]]
            raise UserError(
                f"checkpoint {checkpoint} belongs to another model ({'; '.join(differing)}): "
                "choose another run folder with --out"
            )
        raise UserError(
            f"checkpoint {checkpoint} was written with {name} {json.dumps(before)} and this run has {json.dumps(now)}: "
            f"go on with the same {name}, or choose another run folder with --out"
        )
