"""Every ZeRO stage with the largest micro-batch that fits a machine, and the buffers that DeepSpeed gets."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastvit_engine.config import Config
from fastvit_engine.data.stream.batch_split import BatchSplit, possible_splits, split_batch
from fastvit_engine.sizing.machine import Machine
from fastvit_engine.sizing.memory import training_memory
from fastvit_engine.sizing.parameters import ParameterCounts
from fastvit_engine.sizing.state import Buckets, Memory, accumulation_bytes


@dataclass(frozen=True)
class Candidate:
    """A ZeRO stage with the largest micro-batch that fits, or the smallest if none does.

    sums: false if it would add the micro-batches of a step in 16 bits, for which it is not taken.
    """

    stage: int
    micro_batch: int
    accumulation_steps: int
    buckets: Buckets
    memory: Memory
    fits: bool
    sums: bool = True


def possible_stages(config: Config) -> frozenset[int]:
    """The ZeRO stages that can offload what the configuration says, and compile or capture the model if it is to be."""
    possible = {"none": {0, 1, 2, 3}, "optimizer": {1, 2, 3}, "all": {3}}[config.zero.offload]
    whole = config.train.compile or config.train.cuda_graph
    return frozenset(possible - {3} if whole else possible)


def allowed_stages(config: Config) -> tuple[int, ...]:
    if config.zero.stage != "auto":
        return (config.zero.stage,)
    return tuple(sorted(possible_stages(config)))


def candidate_at(config: Config, machine: Machine, stage: int) -> Candidate:
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
        buckets = buckets_of(config, machine, stage)
        memory = training_memory(
            config, stage, machine.processes, micro_batch, steps > 1, buckets, on_gpu=machine.on_gpu
        )
        fits = summable and memory.total <= machine.usable
        candidate = Candidate(stage, micro_batch, steps, buckets, memory, fits, summable)
        if candidate.fits:
            break
    return candidate


def _splits(config: Config, machine: Machine) -> Iterator[BatchSplit]:
    """The splits of the global batch, the largest micro-batches first; only one if their size is given."""
    if config.train.micro_batch_size is not None:
        yield split_batch(config, machine.processes)
    else:
        yield from possible_splits(config, machine.processes)


def buckets_of(config: Config, machine: Machine, stage: int) -> Buckets:
    """DeepSpeed's buffers as the recipe gives them, else as chosen."""
    given: Mapping[str, Any] = config.deepspeed.get("zero_optimization") or {}
    counts = ParameterCounts.of_run(config)
    overlaps = given.get("overlap_comm", overlaps_communication(machine))
    gathered = given.get("stage3_max_live_parameters", live_parameters(counts)) if stage == 3 else 0
    return Buckets(
        reduce=int(given.get("reduce_bucket_size", reduce_bucket_size(counts, machine))),
        doubled=bool(overlaps),
        gathered=min(int(gathered), counts.parameters),
        secondary_shards=int(given.get("zero_hpz_partition_size", 1)) if stage == 3 else 1,
    )


def reduce_bucket_size(counts: ParameterCounts, machine: Machine) -> int:
    """The number of gradients that are reduced at once.

    An eighth of the model, so that little is left to reduce when the backward pass ends; but enough for the network to
    be busy, more with more hops; and never more than the model has.
    """
    busy = 2**23 * max(1.0, math.log2(machine.processes))
    return int(min(counts.learning, max(counts.learning / 8, busy), 2e8))


def overlaps_communication(machine: Machine) -> bool:
    return machine.on_gpu and machine.processes > 1


def live_parameters(counts: ParameterCounts) -> int:
    return 4 * max(counts.block, counts.largest)


def with_train(config: Config, **settings: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


def with_micro_batch(config: Config, size: int | None) -> Config:
    return with_train(config, micro_batch_size=size)
