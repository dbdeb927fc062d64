"""What is said of each setting that the engine chooses, and what to change if nothing fits."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from fastvit_engine.config import Config
from fastvit_engine.config.checks import check_config, check_zero
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.errors import UserError
from fastvit_engine.observe.units import counted, format_bytes, format_count
from fastvit_engine.sizing.candidates import (
    Candidate,
    allowed_stages,
    candidate_at,
    live_parameters,
    overlaps_communication,
    reduce_bucket_size,
    with_micro_batch,
    with_train,
)
from fastvit_engine.sizing.machine import Machine
from fastvit_engine.sizing.parameters import COMPUTE_BYTES, ParameterCounts
from fastvit_engine.sizing.state import Memory, accumulation_bytes

MICRO_BATCH = "train.micro_batch_size"


@dataclass(frozen=True)
class Choice:
    """One setting, and one line on why."""

    key: str
    value: Any
    reason: str
    by_user: bool = False


def explain_stage(config: Config, machine: Machine, options: list[Candidate], picked: Candidate) -> Choice:
    need = f"{format_bytes(picked.memory.total)} of {format_bytes(machine.usable)}"
    if config.zero.stage != "auto":
        reason = "given" if picked.fits else f"given, although it needs about {need} per {machine.device}"
        return Choice("zero.stage", picked.stage, reason, by_user=True)
    before = [candidate for candidate in options if candidate.stage < picked.stage]
    if picked.stage == 0:
        reason = f"everything fits whole ({need}): one reduction per step, nothing to gather"
    elif not before:
        reason = f"the least that zero.offload = {config.zero.offload} works with"
    elif picked.stage == 1 and picked.accumulation_steps > 1 and accumulation_bytes(config, 0) < 4:
        reason = (
            f"adds the {picked.accumulation_steps} micro-batches of a step in fp32, which stage 0 would add in "
            f"{config.train.number_format}; reduces once per step"
        )
    else:
        lower = before[-1]
        what = f"a micro-batch of {lower.micro_batch} needs {format_bytes(lower.memory.total)}"
        if lower.fits:
            what = f"only a micro-batch of {lower.micro_batch} fits"
        reason = f"at stage {lower.stage} {what}; at this one {picked.micro_batch} need {need}"
    return Choice("zero.stage", picked.stage, reason)


def explain_micro_batch(config: Config, machine: Machine, picked: Candidate, budget: int | None) -> Choice:
    key = MICRO_BATCH
    split = split_batch(with_micro_batch(config, picked.micro_batch), machine.processes)
    share, unequal = split.largest_share, ""
    if split.smallest_share < share:
        unequal = f"; processes take {share} or {split.smallest_share} images per step"
    if config.train.micro_batch_size is not None:
        of_budget = "" if budget is None else f" images of packing.token_budget = {budget:,}"
        if picked.micro_batch == config.train.micro_batch_size:
            limit = "given" if budget is None else f"as many as fit into packing.token_budget = {budget:,}"
        else:
            how = f"the largest divisor of {share}" if split.equal else f"cuts {share} in the fewest passes"
            limit = f"{how} that does not exceed your {config.train.micro_batch_size}{of_budget}"
        return Choice(key, picked.micro_batch, limit + unequal, by_user=True)
    unequal += "; the trial begins with it" if config.train.micro_batch_trial else ""
    if picked.accumulation_steps == 1:
        return Choice(key, picked.micro_batch, f"the whole share of a process fits: no accumulation{unequal}")
    how = f"the largest divisor of {share} that fits" if split.equal else f"cuts {share} in the fewest passes that fit"
    reason = f"{how}; {picked.accumulation_steps} per step"
    if picked.stage <= 1:
        reason += ", of which only the last communicates"
    else:
        reason += ", each reduced: a sharded gradient cannot wait"
    return Choice(key, picked.micro_batch, reason + unequal)


def explain_checkpointing(
    config: Config, machine: Machine, memory: Memory, fewer: int | None, *, by_user: bool
) -> Choice:
    """fewer: a micro-batch with which no block need be checkpointed."""
    count, depth = config.train.activation_checkpointing, resolve_shape(config.model).depth
    images = counted(config.train.micro_batch_size or 0, "image")
    how = "with fewer" if memory.total <= machine.usable else "even so"
    reason = f"of {depth} blocks; {how}, {images} at a time do not fit into {format_bytes(machine.usable)}"
    if fewer is not None:
        reason += f" (train.micro_batch_size={fewer} would, without any)"
    reason = "given" if by_user else reason
    if config.train.offload_activations:
        reason += ", and their inputs wait in host memory"
    return Choice("train.activation_checkpointing", count, reason, by_user)


def explain_recompute(config: Config, machine: Machine, memory: Memory, *, by_user: bool) -> Choice:
    mode = config.train.recompute
    if by_user:
        reason = "given"
    elif mode == "none":
        reason = f"all that the backward pass reads fits ({format_bytes(memory.total)})"
    elif mode == "gelu":
        reason = f"the results of the GELUs would not fit into {format_bytes(machine.usable)} too"
    else:
        reason = "nothing fits unless both normalisations are recomputed too"
    return Choice("train.recompute", mode, reason, by_user)


def zero_choices(config: Config, machine: Machine, picked: Candidate, given: Mapping[str, Any]) -> Iterator[Choice]:
    """The keys of DeepSpeed's `zero_optimization` that it reads at this stage.

    `allgather_bucket_size` is none of them: with a PyTorch that has all_gather_into_tensor, DeepSpeed 0.19 gathers each
    group of parameters in one call.
    """
    chosen = {choice.key: choice for choice in _open_zero_choices(config, machine, picked)}
    for key in given:
        chosen[f"deepspeed.zero_optimization.{key}"] = Choice(
            f"deepspeed.zero_optimization.{key}", given[key], "given", by_user=True
        )
    yield from chosen.values()


def _open_zero_choices(config: Config, machine: Machine, picked: Candidate) -> Iterator[Choice]:
    counts, stage = ParameterCounts.of_run(config), picked.stage
    in_place = (
        config.train.number_format == "bf16" and accumulation_bytes(config, 1) == 4 and config.zero.offload == "none"
    )
    if stage == 0 or (stage == 1 and in_place):
        return  # gradients are reduced where they lie

    def choice(key: str, value: Any, reason: str) -> Choice:
        return Choice(f"deepspeed.zero_optimization.{key}", value, reason)

    yield choice("contiguous_gradients", True, "gradients are copied into one buffer as they come: no holes in memory")
    bucket = reduce_bucket_size(counts, machine)
    part = "all gradients" if bucket == counts.learning else f"one in {counts.learning / bucket:.1f} of the gradients"
    yield choice("reduce_bucket_size", bucket, f"{part}; DeepSpeed's own 500 M would be allocated whole for any model")
    if overlaps_communication(machine):
        why = "reduces during the backward pass"
        yield choice("overlap_comm", True, why + ("" if stage == 3 else ", for a second buffer"))
    else:
        why = "one process has nobody to wait for" if machine.processes == 1 else "a CPU has no stream beside the pass"
        yield choice("overlap_comm", False, why)
    if stage == 3:
        unit = max(counts.block, counts.largest)
        yield choice("stage3_prefetch_bucket_size", 2 * unit, "two blocks ahead")
        yield choice("stage3_max_live_parameters", live_parameters(counts), "four blocks whole at a time")
        yield choice(
            "stage3_max_reuse_distance",
            2 * unit,
            "blocks are let go between forward and backward pass; DeepSpeed's own 1 G would keep most ViTs whole",
        )
        yield from _secondary_shards(machine, picked, counts, COMPUTE_BYTES[config.train.precision])


def _secondary_shards(machine: Machine, picked: Candidate, counts: ParameterCounts, compute: int) -> Iterator[Choice]:
    """ZeRO++'s hpZ: a second copy of the weights, sharded within each node, so that the backward pass gathers there."""
    per_node = machine.processes_per_node
    copy = compute * counts.parameters // per_node
    several_nodes = machine.processes > per_node > 1 and machine.processes % per_node == 0
    if several_nodes and picked.memory.total + copy <= machine.usable:
        reason = f"the backward pass gathers inside the node, for {format_bytes(copy)} more"
        yield Choice("deepspeed.zero_optimization.zero_hpz_partition_size", per_node, reason)


def why_nothing_fits(config: Config, machine: Machine, options: list[Candidate]) -> str:
    """One sentence: how much is missing, and what would be the smallest change."""
    least = min((option for option in options if option.sums), key=lambda option: option.memory.total)
    each = f"per {machine.device}"
    problem = (
        f"nothing fits: {format_count(ParameterCounts.of_run(config).parameters)} parameters need at least "
        f"{format_bytes(least.memory.total)} {each} (ZeRO stage {least.stage}, micro-batch {least.micro_batch}), of "
        f"{available_memory(machine)}"
    )
    if least.memory.total <= replace(machine, budget=None).usable:
        return f"{problem}: train.memory_gib={math.ceil(least.memory.total / 2**30 * 100) / 100:g} would fit"
    if config.train.cuda_graph:
        eager = with_train(config, cuda_graph=False)
        if any(candidate_at(eager, machine, stage).fits for stage in allowed_stages(config)):
            return f"{problem}: train.cuda_graph=false would fit"
    if config.train.micro_batch_size is not None:
        smaller = with_micro_batch(config, None)
        fitting = [c for stage in allowed_stages(config) if (c := candidate_at(smaller, machine, stage)).fits]
        if fitting:
            return f"{problem}: train.micro_batch_size={max(c.micro_batch for c in fitting)} would fit"
    if config.zero.stage != "auto":
        free = config.model_copy(update={"zero": config.zero.model_copy(update={"stage": "auto"})})
        for stage in allowed_stages(free):
            if candidate_at(free, machine, stage).fits:
                return f"{problem}: zero.stage={stage} would fit"
    for settings, spilled in _offloaded(config, machine):
        if any(candidate_at(spilled, machine, stage).fits for stage in allowed_stages(spilled)):
            return f"{problem}: {settings} would fit, with the rest in the host's memory, and be slower"
    for factor in (2, 4, 8, 16, 32, 64):
        processes = machine.processes * factor
        if config.train.global_batch_size >= processes:
            more = replace(machine, processes=processes)
            if any(candidate_at(config, more, stage).fits for stage in allowed_stages(config)):
                return (
                    f"{problem}: {processes} {machine.device}s{'' if machine.on_gpu else ' on more machines'} would do"
                )
    return f"{problem}: take a smaller model or devices with more memory"


def _offloaded(config: Config, machine: Machine) -> Iterator[tuple[str, Config]]:
    """What may be kept in host memory besides, as settings; the stage changes only if it has to."""
    if not machine.on_gpu:
        return
    more = {"none": ("optimizer", "all"), "optimizer": ("all",), "all": ()}[config.zero.offload]
    given = config.zero.stage
    for offload, stage in product(more, ["auto"] if given == "auto" else dict.fromkeys([given, 1, 2, 3])):
        zero = config.zero.model_copy(update={"offload": offload, "stage": stage})
        spilled = config.model_copy(update={"zero": zero})
        try:
            check_config(spilled)
            check_zero(zero)
        except UserError:
            continue
        yield f"zero.offload={offload}" + ("" if stage == given else f" and zero.stage={stage}"), spilled


def available_memory(machine: Machine) -> str:
    """How much memory there is to use, and who says so."""
    whose = " of train.memory_gib" if machine.usable == machine.budget else " that can be used"
    return format_bytes(machine.usable) + whose


def as_written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
