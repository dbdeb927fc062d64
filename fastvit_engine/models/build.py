"""The model that a section `model` describes: a Vision Transformer, a hybrid or a ResNet."""

from collections.abc import Sequence

from fastvit_engine.config import ModelConfig
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.models.image_model import ImageModel
from fastvit_engine.models.resnet import ResNet
from fastvit_engine.models.vit import VisionTransformer


def new_model(config: ModelConfig, *, mean: Sequence[float], std: Sequence[float]) -> ImageModel:
    """In float32, with the weights of PyTorch's layers: `init_weights` sets those of the papers."""
    kind = VisionTransformer if resolve_shape(config).is_transformer else ResNet
    return kind(config, mean=mean, std=std)
