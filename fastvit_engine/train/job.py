"""What lives as long as the processes of a run do, also when training goes back to a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastvit_engine.checkpoint import Checkpointer, store_of
from fastvit_engine.checkpoint.in_memory import Copies, inherited_areas
from fastvit_engine.checkpoint.owner import Ownership
from fastvit_engine.checkpoint.records import Records
from fastvit_engine.config import Config
from fastvit_engine.data.stream.batch_split import BatchSplit, split_batch
from fastvit_engine.distributed.preemption import Preemption
from fastvit_engine.distributed.stragglers import Stragglers
from fastvit_engine.distributed.watchdog import Watchdog
from fastvit_engine.distributed.world import World, limit_collectives
from fastvit_engine.engine.build import build_engine
from fastvit_engine.engine.ema import WeightAverage
from fastvit_engine.engine.protocol import TrainingEngine
from fastvit_engine.evaluate.own import Measure
from fastvit_engine.models import TimmModel, build_for_training
from fastvit_engine.objectives import Objective, Taught
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.compute import Compute
from fastvit_engine.train.health.diagnosis import GradientWatch
from fastvit_engine.train.health.fp8 import Fp8Fallback
from fastvit_engine.train.health.guard import Guard
from fastvit_engine.train.health.replicas import Replicas
from fastvit_engine.train.prepared_model import prepare_model
from fastvit_engine.train.schedule import Schedule
from fastvit_engine.train.step_times import StepTimes
from fastvit_engine.train.throughput import Peak, peak_flops


@dataclass(frozen=True)
class Health:
    """What looks for steps and weights that training must not continue with."""

    guard: Guard
    replicas: Replicas
    gradients: GradientWatch


@dataclass(frozen=True)
class Processes:
    """What looks after the processes of the run, and after the signals they get."""

    watchdog: Watchdog
    preemption: Preemption
    stragglers: Stragglers


@dataclass(frozen=True)
class Job:
    """Everything that a training loop works with."""

    config: Config
    run: RunFolder
    world: World
    schedule: Schedule
    split: BatchSplit
    engine: TrainingEngine
    objective: Objective
    evaluators: Mapping[str, Measure]  # those that `train` was given
    ema: WeightAverage | None
    checkpointer: Checkpointer
    copies: Copies
    health: Health
    processes: Processes
    times: StepTimes
    compute: Compute
    peak: Peak
    owner: Ownership  # of the run folder and the checkpoints, on rank 0
    records: Records  # used on rank 0
    fp8: Fp8Fallback | None = None  # with train.precision: fp8
    accelerated: str | None = None  # of a model of timm: how many modules run fused operations, and by whom


def build_job(
    config: Config,
    run: RunFolder,
    world: World,
    schedule: Schedule,
    watchdog: Watchdog,
    preemption: Preemption,
    owner: Ownership,
    records: Records,
    objective: Objective,
    evaluators: Mapping[str, Measure],
) -> Job:
    """Builds model, engine and all else of a run on this process; collective. `config`: without open ends."""
    torch.manual_seed(config.seed)
    model = build_for_training(config)
    in_fp8 = prepare_model(model, config, world.device)
    split = split_batch(config, world.size)
    engine = build_engine(model, config, split, world)
    limit_collectives(config.watchdog.slow_phase_seconds + config.watchdog.timeout_seconds)  # the engine's groups too
    ema = None
    if config.ema.decay is not None:
        rises_over = schedule.total_steps if isinstance(objective, Taught) else None
        ema = WeightAverage(engine, config.ema.decay, rises_over=rises_over)
    gradients = GradientWatch(engine, world.device)
    if config.health.watch_gradients:
        gradients.start()
    engine.model.train()
    guard = Guard(engine, world, config.health, config.train.precision)
    guard.count = in_fp8.take_overflows if in_fp8 else None
    checkpointer = Checkpointer(
        run,
        store_of(config.checkpoint, run),
        engine,
        ema,
        world,
        config.checkpoint,
        schedule.keep_every,
        check_owner=owner.check,
        upload_records=records.upload,
    )
    return Job(
        config=config,
        run=run,
        world=world,
        schedule=schedule,
        split=split,
        engine=engine,
        objective=objective,
        evaluators=evaluators,
        ema=ema,
        checkpointer=checkpointer,
        copies=Copies(inherited_areas(), checkpointer, world),
        health=Health(guard, Replicas(engine, world), gradients),
        processes=Processes(
            watchdog,
            preemption,
            Stragglers(
                run,
                world,
                config.watchdog,
                watchdog.hosts,
                zero_stage=engine.zero_stage,
                images=[split.images_computed(rank) for rank in range(world.size)],
            ),
        ),
        times=StepTimes(world.device),
        compute=Compute(config, split),
        peak=peak_flops(world, config.train.number_format),
        owner=owner,
        records=records,
        fp8=Fp8Fallback(in_fp8, config.train.fp8.fallback_after) if in_fp8 else None,
        accelerated=model.accelerated if isinstance(model, TimmModel) else None,
    )
