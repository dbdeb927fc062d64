"""One try of a micro-batch: the model of the run, its engine and two updates, on black images."""

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from fastvit_engine.config import Config
from fastvit_engine.config.phases import Phase
from fastvit_engine.data import Batch
from fastvit_engine.data.stream.batch import empty_training_batch
from fastvit_engine.data.stream.batch_split import BatchSplit, mixes_pairs
from fastvit_engine.distributed.world import World
from fastvit_engine.errors import UserError
from fastvit_engine.objectives import ObjectiveFactory, Phased, Taught, build_objective
from fastvit_engine.sizing.candidates import with_micro_batch
from fastvit_engine.sizing.machine import Machine
from fastvit_engine.train.built import build

# Of each GPU's memory, left free: for what evaluation, a save and the communication library take besides.
_MARGIN = 0.05
_UPDATES = 2  # the optimizer's state is there from the first on, and the memory of the allocator settles


@dataclass(frozen=True)
class StepTrial:
    """Tries micro-batches of a run; collective. config: without open ends."""

    config: Config
    machine: Machine
    world: World
    make_objective: ObjectiveFactory
    phase: Phase  # of the run, the one with the most tokens

    def peak_of(self, micro_batch_size: int) -> int | None:
        """Bytes that the process with the most needs, 0 on a CPU; None if those of any do not suffice.

        All processes have the same limit, that of the one with the least free memory, so that they fail together.
        """
        with limited(self.world, self.machine) as device:
            peak: float = math.inf
            try:
                self.run_steps(micro_batch_size)
                peak = torch.cuda.max_memory_reserved(device) if device is not None else 0
            except torch.OutOfMemoryError:
                pass  # its traceback, which holds tensors, is gone when the block ends
            gc.collect()
        largest = self.world.max([peak]).item()
        return None if math.isinf(largest) else int(largest)

    def run_steps(self, micro_batch_size: int) -> None:
        """As training would, with as many passes per step as show what several need."""
        world, config = self.world, with_micro_batch(self.config, micro_batch_size)
        share = -(-config.train.global_batch_size // world.size)
        passes = 1 if micro_batch_size >= share else 2
        split = BatchSplit(micro_batch_size * passes * world.size, world.size, passes, mixes_pairs(config))
        torch.manual_seed(config.seed)
        objective = build_objective(config, world.device, self.make_objective)
        if isinstance(objective, Taught):
            raise UserError(
                f"train.micro_batch_trial = true, and the objective {config.train.objective} learns from a teacher, "
                "which a trial has not: set train.micro_batch_trial=false"
            )
        if isinstance(objective, Phased):
            objective.enter_phase(self.phase)
        built = build(config, split, world)
        engine = built.engine
        try:
            batch = _black_images(micro_batch_size, config, self.phase.image_size)
            for update in range(_UPDATES):
                for _ in range(passes):
                    engine.backward(objective.losses(engine.model, batch).mean())
                    engine.step()
                if built.ema is not None:
                    built.ema.update(update)
        finally:
            engine.close()


def _black_images(size: int, config: Config, image_size: int) -> Batch:
    """Samples that count, unlike padding."""
    padding = empty_training_batch(size, config, image_size)
    return padding._replace(
        weights=torch.ones(size), keys=[f"trial-{number}" for number in range(size)], seeds=np.arange(size)
    )


@contextmanager
def limited(world: World, machine: Machine) -> Iterator[torch.device | None]:
    """Limits what PyTorch takes of each GPU to what is free on every one, less a margin, and to train.memory_gib.

    Yields the GPU, or None on a CPU. Afterwards the memory is free again, and without a limit.
    """
    if world.device.type != "cuda":
        yield None
        return
    device = world.device
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    there = free + torch.cuda.memory_reserved(device) - _MARGIN * total
    limit = -world.max([-there]).item()
    if machine.budget is not None:
        limit = min(limit, machine.budget)
    torch.cuda.set_per_process_memory_fraction(max(0.0, limit) / total, device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield device
    finally:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.reset_peak_memory_stats(device)
