"""One optimizer step on one global batch."""

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from fastvit_engine.data import Batch
from fastvit_engine.distributed.world import World
from fastvit_engine.errors import UserError
from fastvit_engine.objectives import Phased
from fastvit_engine.train.health.diagnosis import Trace
from fastvit_engine.train.health.guard import StepReport
from fastvit_engine.train.job import Job


def take_step(
    job: Job, step: int, micro_batches: Iterable[Batch], *, rehearsal: bool = False
) -> tuple[Trace, StepReport]:
    """Computes forward and backward passes of one global batch and, unless the guard objects, updates the weights.

    step: steps done before. micro_batches: this process's share of the batch comes next in them. rehearsal: computes
    everything and updates nothing.
    """
    engine, health, watchdog, times = job.engine, job.health, job.processes.watchdog, job.times
    seed_step(job.config.seed, step, job.world)
    if isinstance(job.objective, Phased):
        job.objective.enter_phase(job.schedule.phases.at(step))
    if health.gradients.on:
        health.gradients.clear()
    trace = Trace([], [])
    loss_sum = torch.zeros((), device=job.world.device)
    remaining = iter(micro_batches)
    for number in range(1, job.split.accumulation_steps + 1):
        watchdog.phase("waiting for data")
        batch = next(remaining)
        watchdog.phase("forward")
        with times.of("forward"):
            losses = job.objective.losses(engine.model, batch)
            _check_losses(losses, len(batch.keys), job.config.train.objective)
            loss = losses.mean()
            if (scale := job.split.loss_scale(len(losses))) != 1:  # micro-batches differ in size
                loss = loss * scale
        watchdog.phase("backward")
        with times.of("backward"):
            engine.backward(loss)
        loss_sum += loss.detach()
        trace.batches.append(batch)
        trace.losses.append(losses.detach())
        if number == job.split.accumulation_steps:
            fault = health.replicas.compare() if not rehearsal and _compares_replicas(job, step) else None
            health.guard.expect(loss_sum / job.split.accumulation_steps, fault=fault, rehearsal=rehearsal)
        watchdog.phase("optimizer step")
        with times.of("update"):
            job.checkpointer.before_update()
            job.copies.before_update(step + 1)
            engine.step()
    return trace, health.guard.report()


def _check_losses(losses: Any, samples: int, objective: str) -> None:
    if not isinstance(losses, Tensor) or losses.shape != (samples,):
        given = f"losses of shape {list(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise UserError(
            f"the objective {objective} returned {given} for a micro-batch of {samples}: return a tensor with the loss "
            "of each sample, not their mean"
        )


def _compares_replicas(job: Job, step: int) -> bool:
    """Whether the weights of all processes are compared before the update of this step."""
    every = job.config.health.compare_replicas_every
    return every is not None and (step + 1) % every == 0


def seed_step(seed: int, step: int, world: World) -> None:
    """Makes dropout and drop-path of a step a function of (seed, step, rank), which a resumed run repeats."""
    key = int.from_bytes(blake2b(f"{seed}/{step}/{world.rank}".encode(), digest_size=7).digest(), "big")
    torch.default_generator.manual_seed(key)  # torch.manual_seed also formats a stack trace: 0.1 ms per step
    if world.device.type == "cuda":
        torch.cuda.manual_seed(key)


def hash_keys(keys: list[str]) -> int:
    """The sum, modulo 2**64, of each key's 64-bit hash: the same however a global batch is split over processes.

    Padding, whose key is "", counts for nothing.
    """
    return sum(int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") for key in keys if key) % 2**64
