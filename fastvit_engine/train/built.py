"""The model of a run and its engine, as training and the trial of micro-batches build them."""

from dataclasses import dataclass

import torch

from fastvit_engine.config import Config
from fastvit_engine.data.stream.batch_split import BatchSplit
from fastvit_engine.distributed.world import World, limit_collectives
from fastvit_engine.engine.build import build_engine
from fastvit_engine.engine.ema import WeightAverage
from fastvit_engine.engine.protocol import TrainingEngine
from fastvit_engine.models import TimmModel, build_for_training
from fastvit_engine.models.fp8 import Fp8Layers
from fastvit_engine.train.prepared_model import prepare_model


@dataclass(frozen=True)
class Built:
    """What a run computes with."""

    engine: TrainingEngine
    ema: WeightAverage | None
    in_fp8: Fp8Layers | None  # with train.precision: fp8
    accelerated: str | None  # of a model of timm: how many modules run fused operations, and by whom


def build(config: Config, split: BatchSplit, world: World, *, rises_over: int | None = None) -> Built:
    """Builds the model and its engine on this process; collective. `config`: without open ends.

    rises_over: steps in which the decay of the average rises to 1; None: it is constant.
    """
    torch.manual_seed(config.seed)
    model = build_for_training(config)
    in_fp8 = prepare_model(model, config, world.device)
    engine = build_engine(model, config, split, world)
    limit_collectives(config.watchdog.slow_phase_seconds + config.watchdog.timeout_seconds)  # the engine's groups too
    ema = None if config.ema.decay is None else WeightAverage(engine, config.ema.decay, rises_over=rises_over)
    engine.model.train()
    return Built(engine, ema, in_fp8, model.accelerated if isinstance(model, TimmModel) else None)
