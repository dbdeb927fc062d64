"""One optimizer step on one global batch."""

from collections.abc import Iterable
from hashlib import blake2b

import torch
from torch import Tensor, nn

from fastvit_engine.config import DataConfig
from fastvit_engine.data import Batch
from fastvit_engine.data.pixels.mix import mix
from fastvit_engine.data.pixels.randaugment import randaugment
from fastvit_engine.data.stream.batch import targets
from fastvit_engine.distributed.world import World
from fastvit_engine.train.health.diagnosis import Trace
from fastvit_engine.train.health.guard import StepReport
from fastvit_engine.train.state import Job
from fastvit_kernels import FusedCrossEntropy


def take_step(
    job: Job, step: int, micro_batches: Iterable[Batch], *, compares: bool = False, rehearsal: bool = False
) -> tuple[Trace, StepReport]:
    """Forward, backward and, unless the guard objects, update: one global batch, whose share of this process comes next
    in `micro_batches`.

    `compares`: the weights of all processes, before the update. `rehearsal`: computes everything and updates nothing.
    """
    engine, accumulation_steps = job.engine, job.split.accumulation_steps
    seed_step(job.config.seed, step, job.world)
    if job.watch.on:
        job.watch.clear()
    trace = Trace([], [])
    loss_sum = torch.zeros((), device=job.world.device)
    remaining = iter(micro_batches)
    for number in range(1, accumulation_steps + 1):
        job.watchdog.phase("waiting for data")
        batch = next(remaining)
        job.watchdog.phase("forward")
        with job.stragglers.forward():
            losses = training_losses(engine.model, job.criterion, batch, job.config.data, job.world)
            loss = losses.mean()
        job.watchdog.phase("backward")
        engine.backward(loss)
        loss_sum += loss.detach()
        trace.batches.append(batch)
        trace.losses.append(losses.detach())
        if number == accumulation_steps:
            fault = job.replicas.compare() if compares else None
            job.guard.expect(loss_sum / accumulation_steps, fault=fault, rehearsal=rehearsal)
        job.watchdog.phase("optimizer step")
        job.checkpointer.before_update()
        engine.step()
    return trace, job.guard.report()


def training_losses(
    model: nn.Module, criterion: FusedCrossEntropy, batch: Batch, data: DataConfig, world: World
) -> Tensor:
    """The loss of each sample of a micro-batch, [B]; 0 for a sample of weight 0, and for one mixed with it."""
    images = batch.images.to(world.device, non_blocking=True)  # uint8 [B, H, W, 3]; normalised by the patch embedding
    labels = batch.labels.to(world.device, non_blocking=True)
    weights = batch.weights.to(world.device, non_blocking=True)
    if data.randaugment_ops:
        images = randaugment(images, batch.seeds, num_ops=data.randaugment_ops, magnitude=data.randaugment_magnitude)
    if data.mixup or data.cutmix:
        mixed = mix(images, labels, batch.seeds, mixup=data.mixup, cutmix=data.cutmix, mean=data.mean, std=data.std)
        logits = model(mixed.images)
        labels, labels_b = (targets(given, logits.shape[1]) for given in (labels, mixed.labels_b))
        losses = criterion(logits, labels, labels_b=labels_b, mix_weight=mixed.weight, reduction="none")
        weights = weights * weights[mixed.partner]
    else:
        logits = model(images)
        losses = criterion(logits, targets(labels, logits.shape[1]), reduction="none")
    return losses * weights


def seed_step(seed: int, step: int, world: World) -> None:
    """Makes dropout and drop-path of a step a function of (seed, step, rank), which a resumed run repeats."""
    key = int.from_bytes(blake2b(f"{seed}/{step}/{world.rank}".encode(), digest_size=7).digest(), "big")
    torch.default_generator.manual_seed(key)  # torch.manual_seed also formats a stack trace: 0.1 ms a step
    if world.device.type == "cuda":
        torch.cuda.manual_seed(key)


def hash_keys(keys: list[str]) -> int:
    """The sum, modulo 2**64, of each key's 64-bit hash: the same however a global batch is split over processes."""
    return sum(int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") for key in keys) % 2**64
