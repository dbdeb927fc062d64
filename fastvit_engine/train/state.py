"""What lives as long as the processes of a run do."""

from dataclasses import dataclass

from fastvit_engine.checkpoint import Checkpointer
from fastvit_engine.config import Config
from fastvit_engine.distributed.preemption import Preemption
from fastvit_engine.distributed.stragglers import Stragglers
from fastvit_engine.distributed.watchdog import Watchdog
from fastvit_engine.distributed.world import World
from fastvit_engine.engine.build import BatchSplit
from fastvit_engine.engine.ema import WeightAverage
from fastvit_engine.engine.protocol import TrainingEngine
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.health.diagnosis import GradientWatch
from fastvit_engine.train.health.guard import Guard
from fastvit_engine.train.health.replicas import Replicas
from fastvit_engine.train.schedule import Plan
from fastvit_engine.train.throughput import Peak
from fastvit_kernels import FusedCrossEntropy


@dataclass(frozen=True)
class Job:
    """What lives as long as the processes do, also when training goes back to a checkpoint."""

    run: RunFolder
    config: Config
    world: World
    split: BatchSplit
    plan: Plan
    engine: TrainingEngine
    criterion: FusedCrossEntropy
    ema: WeightAverage | None
    checkpointer: Checkpointer
    guard: Guard
    replicas: Replicas
    watch: GradientWatch
    watchdog: Watchdog
    stragglers: Stragglers
    preemption: Preemption
    peak: Peak
    flops_per_image: int
