"""Which model a run trains, and which of its parameters serve pretraining alone."""

from collections.abc import Sequence

import torch
from torch import nn

from fastvit_engine.config import (
    Config,
    DinoConfig,
    MaeConfig,
    MaskedPatchConfig,
    MocoConfig,
    ModelConfig,
    Pretraining,
)
from fastvit_engine.config.timm_model import is_timm
from fastvit_engine.models.build import new_model
from fastvit_engine.models.contrastive import Contrastive
from fastvit_engine.models.image_model import ImageModel
from fastvit_engine.models.masked_autoencoder import MaskedAutoencoder
from fastvit_engine.models.masked_patch import MaskedPatchPredictor
from fastvit_engine.models.self_distilled import SelfDistilled
from fastvit_engine.models.timm_library import skeleton
from fastvit_engine.models.timm_model import TimmModel, build_timm
from fastvit_engine.models.vit import VisionTransformer

_FOR_PRETRAINING = ("mask_token", "decoder.", "projection.", "predictor.")


def is_for_pretraining(name: str) -> bool:
    """Whether a parameter is what a self-supervised objective adds to a model.

    Checkpoints have it, as training continues with it. Exports leave it out, as do runs that start from these weights.
    """
    return name.startswith(_FOR_PRETRAINING)


def build_for_training(config: Config) -> ImageModel | TimmModel:
    """The initialised model in float32 that a run trains, with what its objective adds."""
    if is_timm(config.model):
        return build_timm(config.model, mean=config.data.mean, std=config.data.std)
    model = model_for_training(config.model, config.pretraining, mean=config.data.mean, std=config.data.std)
    if isinstance(model, VisionTransformer):
        model.smaller_images = frozenset(size for size, _ in config.tokens.image_sizes)
    model.init_weights()
    return model


def model_for_training(
    model: ModelConfig, pretraining: Pretraining | None, *, mean: Sequence[float], std: Sequence[float]
) -> ImageModel:
    """As `build_for_training`, but not initialised. pretraining: as Config.pretraining."""
    if isinstance(pretraining, MaeConfig):
        return MaskedAutoencoder(model, pretraining, mean=mean, std=std)
    if isinstance(pretraining, MaskedPatchConfig):
        return MaskedPatchPredictor(model, pretraining, mean=mean, std=std)
    if isinstance(pretraining, DinoConfig):
        return SelfDistilled(model, pretraining, mean=mean, std=std)
    if isinstance(pretraining, MocoConfig):
        return Contrastive(model, pretraining, mean=mean, std=std)
    return new_model(model, mean=mean, std=std)


def shapes_for_training(model: ModelConfig, pretraining: Pretraining | None = None) -> nn.Module:
    """The model of a run with shapes and no memory. pretraining: as Config.pretraining."""
    if is_timm(model):
        return skeleton(model)
    with torch.device("meta"):
        return model_for_training(model, pretraining, mean=(0.5,) * 3, std=(0.5,) * 3)


def parameter_count(model: ModelConfig, pretraining: Pretraining | None = None) -> int:
    """Parameters that learn, of the whole model, counted on one that holds no memory. pretraining: as above."""
    built = shapes_for_training(model, pretraining)
    return sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)
