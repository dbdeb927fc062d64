"""What the engine chooses if a recipe leaves it open: ZeRO stage, micro-batch, recomputation, buffers; and why.

A choice is a function of the recipe, the processes and the memory of the smallest device, so every process makes the
same. Explicit settings take precedence.
"""

import math
from dataclasses import dataclass
from typing import Any

from fastvit_engine.config import Config
from fastvit_engine.config.model_shape import resolve_shape, tokens_in_training
from fastvit_engine.config.packing import budgeted_images
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.data.stream.batch_split import split_batch
from fastvit_engine.engine.optimizers.apex import CLASSES
from fastvit_engine.errors import UserError
from fastvit_engine.observe.units import counted, format_bytes
from fastvit_engine.sizing.activations import block_implementation, checkpointed_blocks, recompute_mode
from fastvit_engine.sizing.candidates import (
    Candidate,
    allowed_stages,
    buckets_of,
    candidate_at,
    with_micro_batch,
    with_train,
)
from fastvit_engine.sizing.machine import Machine
from fastvit_engine.sizing.memory import training_memory
from fastvit_engine.sizing.reasons import (
    Choice,
    as_written,
    available_memory,
    explain_checkpointing,
    explain_micro_batch,
    explain_recompute,
    explain_stage,
    why_nothing_fits,
    zero_choices,
)
from fastvit_engine.sizing.state import Memory

# Tokens of a micro-batch from which on a larger one makes the matrix products little faster.
_ENOUGH_TOKENS = 8192

_MOST_WORKERS, _MOST_WORKERS_ON_CPU = 16, 4


@dataclass(frozen=True)
class Chosen:
    """A configuration without open ends, and why it is what it is.

    tried_as: the digest of the job whose trial found the micro-batch; None: it was computed, or is not to be kept.
    """

    config: Config
    choices: tuple[Choice, ...]
    memory: Memory
    machine: Machine
    tried_as: str | None = None

    @property
    def measured(self) -> str:
        """Which part of the memory is no computation, in words; "" if none."""
        if not is_timm(self.config.model):
            return ""
        return "; that of activations was measured, by a step of the model on two images without data"

    def describe(self) -> str:
        """The choices, one line each, as a run prints them at its start."""
        memory = f"memory per {self.machine.device}: about {format_bytes(self.memory.total)} of "
        memory += f"{available_memory(self.machine)}{self.measured}"
        lines = [f"  {choice.key} = {as_written(choice.value)}: {choice.reason}" for choice in self.choices]
        return "\n".join([memory, *lines])

    def record(self) -> dict[str, Any]:
        """For `environment.json`."""
        return {
            "memory_estimate_bytes": self.memory.total,
            "memory_usable_bytes": self.machine.usable,
            "tried_as": self.tried_as,
            "choices": [
                {"key": choice.key, "value": choice.value, "reason": choice.reason, "by_user": choice.by_user}
                for choice in self.choices
            ],
        }


def choose(config: Config, machine: Machine) -> Chosen:
    """Fills in what `config` leaves open. Raises UserError, with numbers and the nearest remedy, if nothing fits."""
    machine = machine.within(config.train.memory_gib)
    if config.train.micro_batch_trial:
        _check_trial(config, machine)
    budget, config = config.packing.token_budget, _within_budget(config)
    recompute_is_open = config.train.recompute == "auto" and recompute_matters(config, machine)
    options = _options(config, machine)
    if recompute_is_open and not any(candidate.fits for candidate in options):
        config = with_train(config, recompute="all")
        options = _options(config, machine)
    if config.train.offload_activations and not machine.on_gpu:
        raise UserError(
            "train.offload_activations keeps the inputs of blocks in host memory, where those of a CPU are anyway: set "
            "train.offload_activations=false"
        )
    if config.train.cuda_graph and not machine.on_gpu:
        raise UserError("train.cuda_graph = true needs a GPU: set train.cuda_graph=false")
    is_free = has_blocks(config) and not (config.train.compile or config.train.cuda_graph)
    checkpointing_is_given = config.train.activation_checkpointing != "auto"
    checkpointing_is_open = is_free and not checkpointing_is_given
    if checkpointing_is_open and not any(candidate.fits for candidate in options):
        config = with_train(config, activation_checkpointing="all")
        options = _options(config, machine)
    fitting = [candidate for candidate in options if candidate.fits]
    insists = config.zero.stage != "auto" and config.train.micro_batch_size is not None
    if not fitting and not insists:
        raise UserError(why_nothing_fits(config, machine, options))
    largest = split_batch(config, machine.processes).micro_batch_size
    enough = min(largest, math.ceil(_ENOUGH_TOKENS / tokens_in_training(config)))
    picked = next(
        (candidate for candidate in fitting if candidate.micro_batch >= enough),
        max(fitting or options, key=lambda candidate: candidate.micro_batch),
    )
    given = config.deepspeed.get("zero_optimization") or {}
    choices = [
        explain_stage(config, machine, options, picked),
        explain_micro_batch(config, machine, picked, budget),
        *zero_choices(config, machine, picked, given),
    ]
    zero = {choice.key.rpartition(".")[2]: choice.value for choice in choices[2:] if not choice.by_user}
    filled = config.model_copy(
        update={
            "train": with_micro_batch(config, picked.micro_batch).train,
            "zero": config.zero.model_copy(update={"stage": picked.stage}),
            "deepspeed": {**config.deepspeed, **({"zero_optimization": {**zero, **given}} if zero or given else {})},
        }
    )
    if has_blocks(config):
        filled = _with_checkpointed_blocks(filled, machine, picked, fewest=checkpointing_is_open)
    if recompute_is_open:
        filled = _least_recompute(filled, machine, picked)
    memory = _memory(filled, machine, picked)
    if has_blocks(config) and (filled.train.activation_checkpointing or checkpointing_is_given):
        given_size = config.train.micro_batch_size is not None
        fewer = _without_checkpointing(config, machine) if given_size and checkpointing_is_open else None
        choices.insert(2, explain_checkpointing(filled, machine, memory, fewer, by_user=checkpointing_is_given))
    if recompute_matters(config, machine):
        choices.insert(2, explain_recompute(filled, machine, memory, by_user=not recompute_is_open))
    if config.data.num_workers is None and machine.cores is not None:
        choices.append(workers := _choose_workers(config, machine, machine.cores))
        data = config.data.model_copy(update={"num_workers": workers.value})
        filled = filled.model_copy(update={"data": data})
    if config.optimizer.kernels == "apex":
        reason = f"{CLASSES[config.optimizer.kind].name} of NVIDIA's apex updates the weights"
        choices.append(Choice("optimizer.kernels", "apex", reason, by_user=True))
    return Chosen(filled, tuple(choices), memory, machine)


def _check_trial(config: Config, machine: Machine) -> None:
    """Raises UserError if micro-batches cannot be tried, or need not."""
    if not machine.on_gpu:
        raise UserError(
            "train.micro_batch_trial tries micro-batches until the memory of a GPU does not suffice; on CPUs the "
            "system would end the processes instead: set train.micro_batch_trial=false, which computes what fits"
        )
    if (given := config.train.micro_batch_size) is not None:
        raise UserError(
            f"train.micro_batch_trial = true finds out how many images fit, and train.micro_batch_size = {given} says "
            "it: set train.micro_batch_size=null, or train.micro_batch_trial=false"
        )


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
    return [candidate_at(config, machine, stage) for stage in allowed_stages(config)]


def _memory(config: Config, machine: Machine, picked: Candidate) -> Memory:
    """With a configuration that is filled in."""
    stage, accumulates = picked.stage, picked.accumulation_steps > 1
    buckets = buckets_of(config, machine, stage)
    return training_memory(
        config, stage, machine.processes, picked.micro_batch, accumulates, buckets, on_gpu=machine.on_gpu
    )


def recompute_matters(config: Config, machine: Machine) -> bool:
    """Only the fused block decides what to keep, and nothing is kept where only the head learns."""
    how = {"on_gpu": machine.on_gpu, "packed": config.packing.on}
    fused = block_implementation(config.model, config.train.precision, **how) == "fused"
    return fused and config.optimizer.frozen != "backbone"


def _least_recompute(config: Config, machine: Machine, picked: Candidate) -> Config:
    """With memory left beside the micro-batch that was picked, more is kept."""
    without = with_train(config, recompute="none")
    fits = _memory(without, machine, picked).total <= machine.usable
    return without if fits else with_train(config, recompute=recompute_mode(config))


def has_blocks(config: Config) -> bool:
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
        fewer = with_train(config, activation_checkpointing=count)
        if _memory(fewer, machine, picked).total <= machine.usable:
            return fewer
    return with_train(config, activation_checkpointing=blocks)


def _without_checkpointing(config: Config, machine: Machine) -> int | None:
    """The largest micro-batch that fits if every block keeps what its backward pass reads; None if none does."""
    plain = with_micro_batch(with_train(config, activation_checkpointing=0), None)
    fitting = [candidate.micro_batch for candidate in _options(plain, machine) if candidate.fits]
    return max(fitting, default=None)


def _within_budget(config: Config) -> Config:
    """With packing.token_budget as the number of images that it stands for."""
    images = budgeted_images(config)
    if images is None:
        return config
    packing = config.packing.model_copy(update={"token_budget": None})
    return with_micro_batch(config, images).model_copy(update={"packing": packing})
