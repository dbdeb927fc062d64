"""What a trial of micro-batches may choose from, and a choice with what it has found."""

from dataclasses import replace

from fastvit_engine.data.stream.batch_split import possible_splits, split_batch
from fastvit_engine.sizing.candidates import buckets_of, with_micro_batch
from fastvit_engine.sizing.defaults import Chosen
from fastvit_engine.sizing.memory import training_memory
from fastvit_engine.sizing.reasons import MICRO_BATCH
from fastvit_engine.sizing.state import accumulation_bytes


def sizes_to_try(chosen: Chosen) -> list[int]:
    """The micro-batches that divide the global batch, rising.

    Without ZeRO, what is chosen undivided stays so if the micro-batches of a step would be added in 16 bits.
    """
    config, machine = with_micro_batch(chosen.config, None), chosen.machine
    sizes = sorted(split.micro_batch_size for split in possible_splits(config, machine.processes))
    whole = chosen.config.train.micro_batch_size == sizes[-1]
    if config.zero.stage == 0 and accumulation_bytes(config, 0) < 4 and whole:
        return sizes[-1:]
    return sizes


def with_micro_batch_found(chosen: Chosen, size: int, reason: str) -> Chosen:
    """The same choices with a micro-batch that was not computed."""
    config, machine = with_micro_batch(chosen.config, size), chosen.machine
    stage, steps = config.zero.stage, split_batch(config, machine.processes).accumulation_steps
    assert stage != "auto"
    buckets = buckets_of(config, machine, stage)
    memory = training_memory(config, stage, machine.processes, size, steps > 1, buckets, on_gpu=machine.on_gpu)
    choices = tuple(
        replace(choice, value=size, reason=f"{reason}; {steps} per step") if choice.key == MICRO_BATCH else choice
        for choice in chosen.choices
    )
    return replace(chosen, config=config, choices=choices, memory=memory)
