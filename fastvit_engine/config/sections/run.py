"""Everything that defines a run: all sections together."""

from typing import Any

from pydantic import Field

from fastvit_engine.config.sections.augment import AugmentConfig
from fastvit_engine.config.sections.base import Section
from fastvit_engine.config.sections.data import DataConfig
from fastvit_engine.config.sections.evaluation import EvaluateConfig
from fastvit_engine.config.sections.model import InitConfig, ModelConfig
from fastvit_engine.config.sections.optimization import EmaConfig, LossConfig, OptimizerConfig, ScheduleConfig
from fastvit_engine.config.sections.packing import PackingConfig
from fastvit_engine.config.sections.pretraining import DinoConfig, MaeConfig, MaskedPatchConfig, MocoConfig, Pretraining
from fastvit_engine.config.sections.runtime import (
    CheckpointConfig,
    HealthConfig,
    ObserveConfig,
    WatchdogConfig,
    ZeroConfig,
)
from fastvit_engine.config.sections.tokens import TokensConfig
from fastvit_engine.config.sections.training import TrainConfig


class Config(Section):
    """Everything that defines a run. `--set section.key=value` overrides one value."""

    name: str = "run"
    """Name of the run. Without --out, the run folder is runs/<name>."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights, the data order, augmentation and dropout."""

    model: ModelConfig = ModelConfig()
    init: InitConfig = InitConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    tokens: TokensConfig = TokensConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    dino: DinoConfig = DinoConfig()
    mae: MaeConfig = MaeConfig()
    masked_patch: MaskedPatchConfig = MaskedPatchConfig()
    moco: MocoConfig = MocoConfig()
    packing: PackingConfig = PackingConfig()
    ema: EmaConfig = EmaConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    zero: ZeroConfig = ZeroConfig()
    health: HealthConfig = HealthConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    observe: ObserveConfig = ObserveConfig()

    deepspeed: dict[str, Any] = {}
    """Further settings of DeepSpeed, merged over the configuration that the engine writes for it. Keys that another
    section owns, and keys that have no effect here, are refused."""

    @property
    def pretraining(self) -> "Pretraining | None":
        """The section of a self-supervised objective, which adds parameters to the model; None for other objectives."""
        sections: dict[str, Pretraining] = {
            "dino": self.dino,
            "mae": self.mae,
            "masked_patch": self.masked_patch,
            "moco": self.moco,
        }
        return sections.get(self.train.objective)
