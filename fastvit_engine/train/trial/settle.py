"""Which micro-batch a run has that asks for a trial: what it had before, else what an earlier or this trial finds."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastvit_engine.config import Config
from fastvit_engine.distributed.world import World
from fastvit_engine.errors import UserError
from fastvit_engine.observe.disk import if_possible
from fastvit_engine.observe.environment import package_versions
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.observe.units import counted, format_bytes
from fastvit_engine.sizing.defaults import Chosen
from fastvit_engine.sizing.reasons import MICRO_BATCH
from fastvit_engine.sizing.trial import sizes_to_try, with_micro_batch_found
from fastvit_engine.train.trial.remembered import Remembered
from fastvit_engine.train.trial.search import Tried, largest_that_fits, search

# What decides neither how much memory a step takes nor how much there is, by section.
_INDIFFERENT = {
    "train": {"duration", "log_every", "profile", "micro_batch_size"},
    "optimizer": {"learning_rate", "weight_decay", "head_weight_decay", "layer_decay", "betas", "eps"},
    "model": set[str](),
    "zero": set[str](),
    "deepspeed": set[str](),
    "tokens": {"patch_drop_until"},
    "mae": set[str](),
    "masked_patch": set[str](),
    "loss": {"label_smoothing"},
}


def settle_micro_batch(
    chosen: Chosen,
    run: RunFolder,
    world: World,
    folder: Path,
    peak_of: Callable[[int], int | None],
    *,
    continues: bool,
) -> tuple[Chosen, str]:
    """The choices with the micro-batch that a run has, and what is to be said about it; collective.

    folder: of what is remembered. peak_of: tries a micro-batch, as `StepTrial`. continues: the run has done steps. It
    then has the micro-batch that it had with as many processes on such GPUs, whatever is remembered elsewhere.

    Raises UserError if no micro-batch fits.
    """
    sizes = sizes_to_try(chosen)
    remembered = Remembered(folder, _job_of(chosen, world))

    def known() -> tuple[int | None, int | None]:
        before = _size_before(run, world) if continues else None
        return (before if before in sizes else None), remembered.read()

    before, found = world.on_main(known)
    if before is not None:
        reason = "as this run had it so far"
        return with_micro_batch_found(chosen, before, reason), ""
    how_to_forget = f"to try again, delete {remembered.path}"
    if found in sizes:
        reason = "the largest that fits, as an earlier trial has found"
        return with_micro_batch_found(chosen, found, reason), f"micro-batch of an earlier trial: {how_to_forget}"
    tried = search(sizes, chosen.config.train.micro_batch_size or sizes[0], peak_of)
    best = largest_that_fits(tried)
    if best is None:
        raise UserError(
            "train.micro_batch_trial found no micro-batch that fits the GPUs, not even of "
            f"{counted(sizes[0], 'image')}, the fewest at zero.stage = {chosen.config.zero.stage}: raise zero.stage, "
            "set train.activation_checkpointing=all, or use more GPUs"
        )
    write = partial(remembered.write, best.micro_batch_size, tried)
    kept = world.on_main(lambda: if_possible(write, str(remembered.path)))
    chosen = with_micro_batch_found(chosen, best.micro_batch_size, "the largest that fits, by trial")
    message = f"tried micro-batches: {_described(tried)}"
    return chosen, f"{message}; {how_to_forget}, where this is remembered" if kept else message


def _size_before(run: RunFolder, world: World) -> int | None:
    """The micro-batch of the run's last start, if that had as many processes on the same kind of device."""
    try:
        environment = json.loads(run.environment.read_text())
        sizes = {choice["key"]: choice["value"] for choice in environment["defaults"]["choices"]}
        same = environment["world_size"] == world.size and environment["device"] == _device_name(world)
        size = sizes.get(MICRO_BATCH)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return size if same and type(size) is int else None


def _job_of(chosen: Chosen, world: World) -> dict[str, Any]:
    machine, config = chosen.machine, chosen.config
    return {
        "device": _device_name(world),
        "memory": machine.memory,
        "processes": [machine.processes, machine.processes_per_node],
        "versions": package_versions(),
        "config": _settings_of(config),
    }


def _settings_of(config: Config) -> Mapping[str, Any]:
    whole = config.model_dump(mode="json", by_alias=True)
    kept = {
        section: {key: value for key, value in whole[section].items() if key not in left_out}
        for section, left_out in _INDIFFERENT.items()
    }
    pairs = config.augment.mixup > 0 or config.augment.cutmix > 0
    labels = [config.data.max_labels, bool(config.data.soft_labels)]
    return {**kept, "average": config.ema.decay is not None, "pairs": pairs, "labels": labels}


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"


def _described(tried: Sequence[Tried]) -> str:
    return ", ".join(
        f"{each.micro_batch_size} does not fit"
        if each.peak_bytes is None
        else f"{each.micro_batch_size} fits ({format_bytes(each.peak_bytes)})"
        for each in tried
    )
