"""Which micro-batch a run has that asks for a trial: what it had before, else what an earlier or this trial finds."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastvit_engine.config import Config
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.distributed.world import World
from fastvit_engine.errors import UserError
from fastvit_engine.observe.disk import if_possible
from fastvit_engine.observe.environment import package_versions
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.observe.units import counted, format_bytes
from fastvit_engine.sizing.activations import checkpointed_blocks
from fastvit_engine.sizing.defaults import Chosen, has_blocks
from fastvit_engine.sizing.reasons import MICRO_BATCH
from fastvit_engine.sizing.trial import sizes_to_try, with_micro_batch_found
from fastvit_engine.train.trial.remembered import Remembered, digest_of
from fastvit_engine.train.trial.search import Tried, largest_that_fits, search

# What decides neither how much memory a step takes nor how much there is, by section.
_INDIFFERENT = {
    "train": {"duration", "log_every", "profile", "micro_batch_size"},
    "optimizer": {"learning_rate", "weight_decay", "head_weight_decay", "layer_decay", "betas", "eps"},
    "augment": set[str](),
    "model": set[str](),
    "zero": set[str](),
    "deepspeed": set[str](),
    "tokens": {"patch_drop_until"},
    "mae": set[str](),
    "masked_patch": set[str](),
    "loss": {"label_smoothing"},
}
_VARIABLES = ("FASTVIT_KERNELS", "FASTVIT_TUNING", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def settle_micro_batch(
    chosen: Chosen,
    run: RunFolder,
    world: World,
    folder: Path,
    peak_of: Callable[[int], int | None],
    limit: int | None,
    *,
    own_objective: bool,
    continues: bool,
) -> tuple[Chosen, str]:
    """The choices with the micro-batch that a run has, and what is to be said about it; collective.

    folder: of what is remembered. peak_of, limit: tries a micro-batch, in so many bytes, as `StepTrial`. own_objective:
    the objective is the user's, whose code may change, so that nothing is remembered. continues: the run has done
    steps. It keeps the micro-batch that a trial of the same job found, whatever memory is free now.

    Raises UserError if no micro-batch fits.
    """
    sizes = sizes_to_try(chosen)
    if own_objective:
        chosen, _, message = _with_tried(chosen, sizes, peak_of)
        return chosen, f"{message}; not remembered, as memory depends on the code of your objective"
    job = world.on_main(lambda: _job_of(chosen, world))
    chosen = replace(chosen, tried_as=digest_of(job))
    gib = None if limit is None else limit // 2**30
    remembered = Remembered(folder, {**job, "limit_gib": gib})

    def known() -> tuple[int | None, int | None]:
        return (_size_before(run, chosen.tried_as) if continues else None), remembered.read()

    before, found = world.on_main(known)
    if before in sizes:
        return with_micro_batch_found(chosen, before, "as this run had it so far"), ""
    why = "this run has no micro-batch of a trial with these settings, versions and GPUs; " if continues else ""
    how_to_forget = f"to try again, delete {remembered.path}"
    if found in sizes:
        reason = "the largest that fits, as an earlier trial has found"
        return with_micro_batch_found(chosen, found, reason), f"{why}micro-batch of an earlier trial: {how_to_forget}"
    chosen, tried, message = _with_tried(chosen, sizes, peak_of)
    size = chosen.config.train.micro_batch_size
    assert size is not None
    write = partial(remembered.write, size, tried)
    kept = world.on_main(lambda: if_possible(write, str(remembered.path)))
    return chosen, f"{why}{message}" + (f"; {how_to_forget}, where this is remembered" if kept else "")


def _with_tried(
    chosen: Chosen, sizes: Sequence[int], peak_of: Callable[[int], int | None]
) -> tuple[Chosen, list[Tried], str]:
    """The choices with the micro-batch that a trial finds, its tries, and these in words; collective."""
    tried = search(sizes, chosen.config.train.micro_batch_size or sizes[0], peak_of)
    best = largest_that_fits(tried)
    if best is None:
        raise UserError(
            "train.micro_batch_trial found no micro-batch that fits the GPUs, not even of "
            f"{counted(sizes[0], 'image')}, the fewest at zero.stage = {chosen.config.zero.stage}: {_remedy(chosen)}"
        )
    found = with_micro_batch_found(chosen, best.micro_batch_size, "the largest that fits, by trial")
    return found, tried, f"tried micro-batches: {_described(tried)}"


def _remedy(chosen: Chosen) -> str:
    """What helps and is not done yet, in words."""
    config = chosen.config
    more_blocks = has_blocks(config) and checkpointed_blocks(config) < resolve_shape(config.model).depth
    checkpointing = "set train.activation_checkpointing=all, " if more_blocks else ""
    sharding = "use more GPUs" if config.zero.stage == 3 else "raise zero.stage"
    return f"{checkpointing}{sharding}, or use GPUs with more memory"


def _size_before(run: RunFolder, tried_as: str | None) -> int | None:
    """The micro-batch of the run's last start, if a trial of the same job found it."""
    try:
        environment = json.loads(run.environment.read_text())
        sizes = {choice["key"]: choice["value"] for choice in environment["defaults"]["choices"]}
        same = environment["defaults"]["tried_as"] == tried_as
        size = sizes.get(MICRO_BATCH)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return size if same and type(size) is int else None


def _job_of(chosen: Chosen, world: World) -> dict[str, Any]:
    """What decides how much memory a step takes, and how much a GPU has in all."""
    machine, config = chosen.machine, chosen.config
    return {
        "device": _device_name(world),
        "memory": machine.memory,
        "processes": [machine.processes, machine.processes_per_node],
        "versions": package_versions(),
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
        "config": _settings_of(config),
    }


def _settings_of(config: Config) -> Mapping[str, Any]:
    whole = config.model_dump(mode="json", by_alias=True)
    kept = {
        section: {key: value for key, value in whole[section].items() if key not in left_out}
        for section, left_out in _INDIFFERENT.items()
    }
    labels = [config.data.max_labels, bool(config.data.soft_labels)]
    return {**kept, "average": config.ema.decay is not None, "labels": labels}


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"


def _described(tried: Sequence[Tried]) -> str:
    return ", ".join(
        f"{each.micro_batch_size} does not fit"
        if each.peak_bytes is None
        else f"{each.micro_batch_size} fits ({format_bytes(each.peak_bytes)})"
        for each in tried
    )
