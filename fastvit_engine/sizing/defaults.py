"""What the engine chooses if a recipe leaves it open: ZeRO stage, micro-batch, recomputation, buffers; and why.

A choice is a function of the recipe, the processes and the memory of the smallest device, so every process makes the
same. Explicit settings take precedence.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastvit_engine.config import Config
from fastvit_engine.config.model_shape import resolve_shape, tokens_in_training
from fastvit_engine.config.packing import budgeted_images
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.control_groups import memory_limit
from fastvit_engine.cores import cores_here
from fastvit_engine.data.stream.batch_split import BatchSplit, possible_splits, split_batch
from fastvit_engine.distributed.world import World
from fastvit_engine.engine.optimizers.apex import CLASSES
from fastvit_engine.errors import UserError
from fastvit_engine.observe.units import counted, format_bytes, format_count
from fastvit_engine.sizing.activations import block_implementation, checkpointed_blocks, recompute_mode
from fastvit_engine.sizing.memory import training_memory
from fastvit_engine.sizing.parameters import COMPUTE_BYTES, ParameterCounts
from fastvit_engine.sizing.state import Buckets, Memory, accumulation_bytes

# Allowances, not measurements. GPU: CUDA context, libraries and NCCL's buffers; holes in the allocator's memory.
# CPU: data workers, page cache and the rest of the machine.
_GPU_RESERVED = 3 * 2**29
_GPU_USABLE = 0.92
_CPU_USABLE = 0.75
# Tokens of a micro-batch from which on a larger one makes the matrix products little faster.
_ENOUGH_TOKENS = 8192
_MOST_WORKERS, _MOST_WORKERS_ON_CPU = 16, 4


@dataclass(frozen=True)
class Machine:
    """The processes of a job and the device that each has."""

    processes: int
    processes_per_node: int
    memory: int  # bytes of each process's device; of the smallest if they differ
    on_gpu: bool
    cores: int | None = None  # of each process, 0 if there are more processes than cores; None: not known
    budget: int | None = None  # bytes for model and activations, if that is less than there is; None: all

    @property
    def usable(self) -> int:
        """Bytes for model and activations."""
        there = int((self.memory - _GPU_RESERVED) * _GPU_USABLE if self.on_gpu else self.memory * _CPU_USABLE)
        return there if self.budget is None else min(self.budget, there)

    def within(self, gib: float | None) -> "Machine":
        """The same with train.memory_gib as its budget."""
        return self if gib is None else replace(self, budget=int(gib * 2**30))

    @property
    def device(self) -> str:
        return "GPU" if self.on_gpu else "process"


@dataclass(frozen=True)
class Choice:
    """One setting, and one line on why."""

    key: str
    value: Any
    reason: str
    by_user: bool = False


@dataclass(frozen=True)
class Candidate:
    """A ZeRO stage with the largest micro-batch that fits, or the smallest if none does."""

    stage: int
    micro_batch: int
    accumulation_steps: int
    buckets: Buckets
    memory: Memory
    fits: bool


@dataclass(frozen=True)
class Chosen:
    """A configuration without open ends, and why it is what it is."""

    config: Config
    choices: tuple[Choice, ...]
    memory: Memory
    machine: Machine

    @property
    def measured(self) -> str:
        """Which part of the memory is no computation, in words; "" if none."""
        if not is_timm(self.config.model):
            return ""
        return "; that of activations was measured, by a step of the model on two images without data"

    def describe(self) -> str:
        """The choices, one line each, as a run prints them at its start."""
        memory = f"memory per {self.machine.device}: about {format_bytes(self.memory.total)} of "
        memory += f"{_available(self.machine)}{self.measured}"
        lines = [f"  {choice.key} = {_written(choice.value)}: {choice.reason}" for choice in self.choices]
        return "\n".join([memory, *lines])

    def record(self) -> dict[str, Any]:
        """For `environment.json`."""
        return {
            "memory_estimate_bytes": self.memory.total,
            "memory_usable_bytes": self.machine.usable,
            "choices": [
                {"key": choice.key, "value": choice.value, "reason": choice.reason, "by_user": choice.by_user}
                for choice in self.choices
            ],
        }


def machine_of(world: World) -> Machine:
    """The machine this job runs on; collective."""
    on_gpu = world.device.type == "cuda"
    per_node = len(world.node_ranks)
    here = [device_memory(per_node, on_gpu=on_gpu), per_node, cores_here() // per_node]
    memory, per_node, cores = (-world.max([-figure for figure in here])).long().tolist()
    return Machine(world.size, per_node, memory, on_gpu, cores)


def machine_here(processes: int) -> Machine:
    """This machine, with all processes of a job on it."""
    on_gpu = torch.cuda.is_available()
    return Machine(processes, processes, device_memory(processes, on_gpu=on_gpu), on_gpu, cores_here() // processes)


def device_memory(processes_per_node: int, *, on_gpu: bool) -> int:
    """Bytes of the current GPU, or this process's share of the memory that the machine or its container has."""
    if on_gpu:
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = memory_limit()
    return (total if allowed is None else min(total, allowed.limit)) // processes_per_node


def choose(config: Config, machine: Machine) -> Chosen:
    """Fills in what `config` leaves open. Raises UserError, with numbers and the nearest remedy, if nothing fits."""
    machine = machine.within(config.train.memory_gib)
    budget, config = config.packing.token_budget, _within_budget(config)
    recompute_is_open = config.train.recompute == "auto" and _recompute_matters(config, machine)
    options = _options(config, machine)
    if recompute_is_open and not any(candidate.fits for candidate in options):
        config = _with_train(config, recompute="all")
        options = _options(config, machine)
    if config.train.offload_activations and not machine.on_gpu:
        raise UserError(
            "train.offload_activations keeps the inputs of blocks in host memory, where those of a CPU are anyway: set "
            "train.offload_activations=false"
        )
    is_free = _has_blocks(config) and not config.train.compile
    checkpointing_is_open = config.train.activation_checkpointing == "auto" and is_free
    if checkpointing_is_open and not any(candidate.fits for candidate in options):
        config = _with_train(config, activation_checkpointing="all")
        options = _options(config, machine)
    fitting = [candidate for candidate in options if candidate.fits]
    insists = config.zero.stage != "auto" and config.train.micro_batch_size is not None
    if not fitting and not insists:
        raise UserError(_nothing_fits(config, machine, options))
    largest = split_batch(config, machine.processes).micro_batch_size
    enough = min(largest, math.ceil(_ENOUGH_TOKENS / tokens_in_training(config)))
    picked = next(
        (candidate for candidate in fitting if candidate.micro_batch >= enough),
        max(fitting or options, key=lambda candidate: candidate.micro_batch),
    )
    given = config.deepspeed.get("zero_optimization") or {}
    choices = [
        _explain_stage(config, machine, options, picked),
        _explain_micro_batch(config, machine, picked, budget),
        *_zero_choices(config, machine, picked, given),
    ]
    zero = {choice.key.rpartition(".")[2]: choice.value for choice in choices[2:] if not choice.by_user}
    filled = config.model_copy(
        update={
            "train": _with_micro_batch(config, picked.micro_batch).train,
            "zero": config.zero.model_copy(update={"stage": picked.stage}),
            "deepspeed": {**config.deepspeed, **({"zero_optimization": {**zero, **given}} if zero or given else {})},
        }
    )
    if _has_blocks(config):
        filled = _with_checkpointed_blocks(filled, machine, picked, fewest=checkpointing_is_open)
    if recompute_is_open:
        filled = _least_recompute(filled, machine, picked)
    memory = _memory(filled, machine, picked)
    if _has_blocks(config) and (filled.train.activation_checkpointing or not checkpointing_is_open):
        given_size = config.train.micro_batch_size is not None
        fewer = _without_checkpointing(config, machine) if given_size and checkpointing_is_open else None
        choices.insert(2, _explain_checkpointing(filled, machine, memory, fewer, by_user=not checkpointing_is_open))
    if _recompute_matters(config, machine):
        choices.insert(2, _explain_recompute(filled, machine, memory, by_user=not recompute_is_open))
    if config.data.num_workers is None and machine.cores is not None:
        choices.append(workers := _choose_workers(config, machine, machine.cores))
        data = config.data.model_copy(update={"num_workers": workers.value})
        filled = filled.model_copy(update={"data": data})
    if config.optimizer.kernels == "apex":
        reason = f"{CLASSES[config.optimizer.kind].name} of NVIDIA's apex updates the weights"
        choices.append(Choice("optimizer.kernels", "apex", reason, by_user=True))
    return Chosen(filled, tuple(choices), memory, machine)


def _choose_workers(config: Config, machine: Machine, cores: int) -> Choice:
    """Decoding processes of each process. Beside a GPU they have all cores but one; a CPU trains on the same cores."""
    key, shared = "data.num_workers", f"{counted(cores, 'core')} per process" if cores else "more processes than cores"
    if config.data.order == "stream":
        return Choice(
            key,
            config.data.workers,
            "the same on every machine, because the order of data.order = stream depends on it",
        )
    if machine.on_gpu:
        return Choice(key, max(1, min(cores - 1, _MOST_WORKERS)), f"{shared}, one of which serves the GPU")
    return Choice(key, max(1, min(cores, _MOST_WORKERS_ON_CPU)), f"{shared}, on which training runs too")


def _options(config: Config, machine: Machine) -> list[Candidate]:
    return [_candidate(config, machine, stage) for stage in _allowed_stages(config)]


def _memory(config: Config, machine: Machine, picked: Candidate) -> Memory:
    """With a configuration that is filled in."""
    stage, accumulates = picked.stage, picked.accumulation_steps > 1
    buckets = _buckets(config, machine, stage)
    return training_memory(
        config, stage, machine.processes, picked.micro_batch, accumulates, buckets, on_gpu=machine.on_gpu
    )


def _recompute_matters(config: Config, machine: Machine) -> bool:
    """Only the fused block decides what to keep, and nothing is kept where only the head learns."""
    how = {"on_gpu": machine.on_gpu, "packed": config.packing.on}
    fused = block_implementation(config.model, config.train.precision, **how) == "fused"
    return fused and config.optimizer.frozen != "backbone"


def _least_recompute(config: Config, machine: Machine, picked: Candidate) -> Config:
    """With memory left beside the micro-batch that was picked, more is kept."""
    without = _with_train(config, recompute="none")
    fits = _memory(without, machine, picked).total <= machine.usable
    return without if fits else _with_train(config, recompute=recompute_mode(config))


def _has_blocks(config: Config) -> bool:
    """Whether there are blocks that may keep their input alone."""
    return (
        not is_timm(config.model)
        and resolve_shape(config.model).is_transformer
        and config.optimizer.frozen != "backbone"
    )


def _with_checkpointed_blocks(config: Config, machine: Machine, picked: Candidate, *, fewest: bool) -> Config:
    """With the number of blocks that keep their input alone; if it is open, as few as the memory allows."""
    blocks = checkpointed_blocks(config)
    for count in range(blocks) if fewest else ():
        fewer = _with_train(config, activation_checkpointing=count)
        if _memory(fewer, machine, picked).total <= machine.usable:
            return fewer
    return _with_train(config, activation_checkpointing=blocks)


def _without_checkpointing(config: Config, machine: Machine) -> int | None:
    """The largest micro-batch that fits if every block keeps what its backward pass reads; None if none does."""
    plain = _with_micro_batch(_with_train(config, activation_checkpointing=0), None)
    fitting = [candidate.micro_batch for candidate in _options(plain, machine) if candidate.fits]
    return max(fitting, default=None)


def _explain_checkpointing(
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


def _explain_recompute(config: Config, machine: Machine, memory: Memory, *, by_user: bool) -> Choice:
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


def _with_train(config: Config, **settings: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


def _with_micro_batch(config: Config, size: int | None) -> Config:
    return _with_train(config, micro_batch_size=size)


def possible_stages(config: Config) -> frozenset[int]:
    """The ZeRO stages that can offload what the configuration says, and compile the model if it is to be compiled."""
    possible = {"none": {0, 1, 2, 3}, "optimizer": {1, 2, 3}, "all": {3}}[config.zero.offload]
    return frozenset(possible - {3} if config.train.compile else possible)


def candidates(config: Config, machine: Machine) -> list[Candidate]:
    """Every stage by itself, with the largest micro-batch that fits, or the smallest if none does."""
    rows, machine = [], machine.within(config.train.memory_gib)
    for stage in sorted(possible_stages(config)):
        zero = config.zero.model_copy(update={"stage": stage})
        rows.append(_candidate(config.model_copy(update={"zero": zero}), machine, stage))
    return rows


def _allowed_stages(config: Config) -> tuple[int, ...]:
    if config.zero.stage != "auto":
        return (config.zero.stage,)
    return tuple(sorted(possible_stages(config)))


def _candidate(config: Config, machine: Machine, stage: int) -> Candidate:
    """The largest micro-batch that fits at this stage.

    Stage 0 would add the micro-batches of a step in the precision of the gradients: with bf16 and fp16 the engine takes
    it for undivided steps only.
    """
    tries = list(_splits(config, machine))
    summable = True
    if config.zero.stage == "auto" and stage == 0 and accumulation_bytes(config, 0) < 4:
        tries, summable = tries[:1], tries[0].accumulation_steps == 1
    for split in tries:
        micro_batch, steps = split.micro_batch_size, split.accumulation_steps
        buckets = _buckets(config, machine, stage)
        memory = training_memory(
            config, stage, machine.processes, micro_batch, steps > 1, buckets, on_gpu=machine.on_gpu
        )
        candidate = Candidate(
            stage, micro_batch, steps, buckets, memory, fits=summable and memory.total <= machine.usable
        )
        if candidate.fits:
            break
    return candidate


def _splits(config: Config, machine: Machine) -> Iterator[BatchSplit]:
    """The splits of the global batch, the largest micro-batches first; only one if their size is given."""
    if config.train.micro_batch_size is not None:
        yield split_batch(config, machine.processes)
    else:
        yield from possible_splits(config, machine.processes)


def _buckets(config: Config, machine: Machine, stage: int) -> Buckets:
    """DeepSpeed's buffers as the recipe gives them, else as chosen."""
    given: Mapping[str, Any] = config.deepspeed.get("zero_optimization") or {}
    counts = _counts(config)
    overlaps = given.get("overlap_comm", _overlaps(machine))
    gathered = given.get("stage3_max_live_parameters", _live(counts)) if stage == 3 else 0
    return Buckets(
        reduce=int(given.get("reduce_bucket_size", _reduce_bucket(counts, machine))),
        doubled=bool(overlaps),
        gathered=min(int(gathered), counts.parameters),
        secondary_shards=int(given.get("zero_hpz_partition_size", 1)) if stage == 3 else 1,
    )


def _counts(config: Config) -> ParameterCounts:
    return ParameterCounts.of_run(config)


def _reduce_bucket(counts: ParameterCounts, machine: Machine) -> int:
    """The number of gradients that are reduced at once.

    An eighth of the model, so that little is left to reduce when the backward pass ends; but enough for the network to
    be busy, more with more hops; and never more than the model has.
    """
    busy = 2**23 * max(1.0, math.log2(machine.processes))
    return int(min(counts.learning, max(counts.learning / 8, busy), 2e8))


def _overlaps(machine: Machine) -> bool:
    return machine.on_gpu and machine.processes > 1


def _live(counts: ParameterCounts) -> int:
    return 4 * max(counts.block, counts.largest)


def _explain_stage(config: Config, machine: Machine, options: list[Candidate], picked: Candidate) -> Choice:
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


def _within_budget(config: Config) -> Config:
    """With packing.token_budget as the number of images that it stands for."""
    images = budgeted_images(config)
    if images is None:
        return config
    packing = config.packing.model_copy(update={"token_budget": None})
    return _with_micro_batch(config, images).model_copy(update={"packing": packing})


def _explain_micro_batch(config: Config, machine: Machine, picked: Candidate, budget: int | None) -> Choice:
    key = "train.micro_batch_size"
    split = split_batch(_with_micro_batch(config, picked.micro_batch), machine.processes)
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
    if picked.accumulation_steps == 1:
        return Choice(key, picked.micro_batch, f"the whole share of a process fits: no accumulation{unequal}")
    how = f"the largest divisor of {share} that fits" if split.equal else f"cuts {share} in the fewest passes that fit"
    reason = f"{how}; {picked.accumulation_steps} per step"
    if picked.stage <= 1:
        reason += ", of which only the last communicates"
    else:
        reason += ", each reduced: a sharded gradient cannot wait"
    return Choice(key, picked.micro_batch, reason + unequal)


def _zero_choices(config: Config, machine: Machine, picked: Candidate, given: Mapping[str, Any]) -> Iterator[Choice]:
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
    counts, stage = _counts(config), picked.stage
    in_place = (
        config.train.number_format == "bf16" and accumulation_bytes(config, 1) == 4 and config.zero.offload == "none"
    )
    if stage == 0 or (stage == 1 and in_place):
        return  # gradients are reduced where they lie

    def choice(key: str, value: Any, reason: str) -> Choice:
        return Choice(f"deepspeed.zero_optimization.{key}", value, reason)

    yield choice("contiguous_gradients", True, "gradients are copied into one buffer as they come: no holes in memory")
    bucket = _reduce_bucket(counts, machine)
    part = "all gradients" if bucket == counts.learning else f"one in {counts.learning / bucket:.1f} of the gradients"
    yield choice("reduce_bucket_size", bucket, f"{part}; DeepSpeed's own 500 M would be allocated whole for any model")
    if _overlaps(machine):
        why = "reduces during the backward pass"
        yield choice("overlap_comm", True, why + ("" if stage == 3 else ", for a second buffer"))
    else:
        why = "one process has nobody to wait for" if machine.processes == 1 else "a CPU has no stream beside the pass"
        yield choice("overlap_comm", False, why)
    if stage == 3:
        unit = max(counts.block, counts.largest)
        yield choice("stage3_prefetch_bucket_size", 2 * unit, "two blocks ahead")
        yield choice("stage3_max_live_parameters", _live(counts), "four blocks whole at a time")
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


def _nothing_fits(config: Config, machine: Machine, options: list[Candidate]) -> str:
    """One sentence: how much is missing, and what would be the smallest change."""
    least = min(options, key=lambda candidate: candidate.memory.total)
    each = f"per {machine.device}"
    problem = (
        f"nothing fits: {format_count(_counts(config).parameters)} parameters need at least "
        f"{format_bytes(least.memory.total)} {each} (ZeRO stage {least.stage}, micro-batch {least.micro_batch}), of "
        f"{_available(machine)}"
    )
    if least.memory.total <= replace(machine, budget=None).usable:
        return f"{problem}: train.memory_gib={math.ceil(least.memory.total / 2**30 * 100) / 100:g} would fit"
    if config.train.micro_batch_size is not None:
        smaller = _with_micro_batch(config, None)
        fitting = [c for stage in _allowed_stages(config) if (c := _candidate(smaller, machine, stage)).fits]
        if fitting:
            return f"{problem}: train.micro_batch_size={max(c.micro_batch for c in fitting)} would fit"
    if config.zero.stage != "auto":
        free = config.model_copy(update={"zero": config.zero.model_copy(update={"stage": "auto"})})
        for stage in _allowed_stages(free):
            if _candidate(free, machine, stage).fits:
                return f"{problem}: zero.stage={stage} would fit"
    for offload, stage in (("optimizer", 2), ("all", 3)):
        if config.zero.offload == "none":
            update = {"offload": offload, "stage": stage}
            spilled = config.model_copy(update={"zero": config.zero.model_copy(update=update)})
            if machine.on_gpu and _candidate(spilled, machine, stage).fits:
                return f"{problem}: zero.offload={offload} would fit, with the rest in the host's memory, and be slower"
    for factor in (2, 4, 8, 16, 32, 64):
        processes = machine.processes * factor
        if config.train.global_batch_size >= processes:
            more = replace(machine, processes=processes)
            if any(_candidate(config, more, stage).fits for stage in _allowed_stages(config)):
                return (
                    f"{problem}: {processes} {machine.device}s{'' if machine.on_gpu else ' on more machines'} would do"
                )
    return f"{problem}: take a smaller model or devices with more memory"


def _available(machine: Machine) -> str:
    """How much memory there is to use, and who says so."""
    whose = " of train.memory_gib" if machine.usable == machine.budget else " that can be used"
    return format_bytes(machine.usable) + whose


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
