"""One try of a micro-batch: the model of the run, its engine and two updates, on black images."""

import gc
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from fastvit_engine.config import Config
from fastvit_engine.config.phases import Phase
from fastvit_engine.data import Batch
from fastvit_engine.data.stream.batch import empty_training_batch
from fastvit_engine.data.stream.batch_split import BatchSplit, mixes_pairs
from fastvit_engine.distributed.world import World
from fastvit_engine.engine.deepspeed import linear_restored
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

    def limit(self) -> int | None:
        """Bytes that PyTorch may take of each GPU; collective. None on a CPU.

        What is free on every GPU, less a margin, and at most train.memory_gib.
        """
        if self.world.device.type != "cuda":
            return None
        device = self.world.device
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        there = free + torch.cuda.memory_reserved(device) - _MARGIN * total
        limit = max(0, int(-self.world.max([-there]).item()))
        return limit if self.machine.budget is None else min(limit, self.machine.budget)

    def peak_of(self, micro_batch_size: int) -> int | None:
        """Bytes that the process with the most needs, 0 on a CPU; None if those of any do not suffice.

        All processes have the same limit, that of the one with the least free memory, so that they fail together.
        """
        with limited(self.world, self.limit()) as device:
            peak: float = math.inf
            try:
                self.run_steps(micro_batch_size)
                peak = torch.cuda.max_memory_reserved(device) if device is not None else 0
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                # the error's traceback, which holds tensors, is gone when the block ends
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
        with linear_restored():
            built = build(config, split, world)
            with closing(built.engine) as engine:
                batch = _black_images(micro_batch_size, config, self.phase.image_size)
                for update in range(_UPDATES):
                    for _ in range(passes):
                        engine.backward(objective.losses(engine.model, batch).mean())
                        engine.step()
                    if built.ema is not None:
                        built.ema.update(update)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the memory of a GPU did not suffice: PyTorch's allocator says so by a type, libraries by words alone."""
    words = ("error: out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(each in str(error) for each in words)


def _black_images(size: int, config: Config, image_size: int) -> Batch:
    """Samples that count, unlike padding."""
    padding = empty_training_batch(size, config, image_size)
    return padding._replace(
        weights=torch.ones(size), keys=[f"trial-{number}" for number in range(size)], seeds=np.arange(size)
    )


@contextmanager
def limited(world: World, limit: int | None) -> Iterator[torch.device | None]:
    """Limits what PyTorch takes of this process's GPU to that many bytes.

    Yields the GPU, or None on a CPU. Afterwards the memory is free again, and without a limit.
    """
    if limit is None:
        yield None
        return
    device = world.device
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield device
    finally:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.reset_peak_memory_stats(device)
