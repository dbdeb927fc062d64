"""A model from whatever form of configuration a program holds: `fastvit_engine.build_model`."""

from collections.abc import Sequence

from fastvit_engine.config import Config, DataConfig, ModelConfig, Resolved
from fastvit_engine.config.timm_model import check_timm_model, is_timm
from fastvit_engine.models.build import new_model
from fastvit_engine.models.image_model import ImageModel
from fastvit_engine.models.timm_model import TimmModel, build_timm


def build_model(
    config: Resolved | Config | ModelConfig,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageModel | TimmModel:
    """Builds an initialised model in float32; under torch.device("meta"), one of shapes only.

    config: what `load_config` returns, or a Config, or its section `model` alone.
    mean, std: of pixels in [0, 1] per colour channel, with which the model normalises images. Default: those of section
    `data`; with a ModelConfig alone, that section's defaults of 0.5.

    Raises UserError naming the key if `config` does not make a model.
    """
    config = config.config if isinstance(config, Resolved) else config
    section, data = (config.model, config.data) if isinstance(config, Config) else (config, DataConfig())
    mean, std = data.mean if mean is None else mean, data.std if std is None else std
    check_timm_model(section)
    if is_timm(section):
        return build_timm(section, mean=mean, std=std)
    model = new_model(section, mean=mean, std=std)
    model.init_weights()
    return model
