"""The typed sections of a configuration: every key with its type, range, default and meaning.

The string under a field is its documentation: `fastvit config explain` and docs/configuration.md print it. Say what the
value is, its unit, and what null means.
"""

from fastvit_engine.config.sections.augment import AugmentConfig, CropKind
from fastvit_engine.config.sections.data import BEFORE_EVAL_TRANSFORM, DataConfig, DataSource, EvalTransform
from fastvit_engine.config.sections.evaluation import EvaluateConfig, FewShotConfig
from fastvit_engine.config.sections.model import InitConfig, ModelConfig
from fastvit_engine.config.sections.optimization import (
    EmaConfig,
    LossConfig,
    OptimizerConfig,
    OptimizerName,
    ScheduleConfig,
)
from fastvit_engine.config.sections.packing import PackingConfig
from fastvit_engine.config.sections.pretraining import DinoConfig, MaeConfig, MaskedPatchConfig, MocoConfig, Pretraining
from fastvit_engine.config.sections.run import Config
from fastvit_engine.config.sections.runtime import (
    CheckpointConfig,
    HealthConfig,
    ObserveConfig,
    WatchdogConfig,
    ZeroConfig,
)
from fastvit_engine.config.sections.tokens import TokensConfig
from fastvit_engine.config.sections.training import OBJECTIVES, Fp8Config, ProfileConfig, TrainConfig, profiled_steps

__all__ = [
    "AugmentConfig",
    "BEFORE_EVAL_TRANSFORM",
    "CheckpointConfig",
    "Config",
    "CropKind",
    "DataConfig",
    "DataSource",
    "DinoConfig",
    "EmaConfig",
    "EvalTransform",
    "EvaluateConfig",
    "FewShotConfig",
    "Fp8Config",
    "HealthConfig",
    "InitConfig",
    "LossConfig",
    "MaeConfig",
    "MaskedPatchConfig",
    "MocoConfig",
    "ModelConfig",
    "OBJECTIVES",
    "ObserveConfig",
    "OptimizerConfig",
    "OptimizerName",
    "PackingConfig",
    "Pretraining",
    "ProfileConfig",
    "ScheduleConfig",
    "TokensConfig",
    "TrainConfig",
    "WatchdogConfig",
    "ZeroConfig",
    "profiled_steps",
]
