"""The configuration of a run: typed sections, read from a recipe and from --set."""

from fastvit_engine.config.load import Resolved, load_config
from fastvit_engine.config.recipes import RECIPES, recipe_names, recipe_paths
from fastvit_engine.config.sections import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DataSource,
    EmaConfig,
    EvalTransform,
    EvaluateConfig,
    HealthConfig,
    InitConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    WatchdogConfig,
    ZeroConfig,
)

__all__ = [
    "AugmentConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DataSource",
    "EmaConfig",
    "EvalTransform",
    "EvaluateConfig",
    "HealthConfig",
    "InitConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RECIPES",
    "Resolved",
    "ScheduleConfig",
    "TrainConfig",
    "WatchdogConfig",
    "ZeroConfig",
    "load_config",
    "recipe_names",
    "recipe_paths",
]
