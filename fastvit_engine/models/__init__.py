"""Vision Transformers, hybrids and ResNets by their paper names, timm's models by theirs, and what they cost."""

from fastvit_engine.config.model_shape import full_title, model_title, resolve_shape
from fastvit_engine.models.flops import (
    computed_flops,
    computed_macs,
    forward_macs,
    packed_flops,
    run_flops,
    training_flops,
)
from fastvit_engine.models.from_config import build_model
from fastvit_engine.models.image_model import ImageModel
from fastvit_engine.models.pretraining import build_for_training, is_for_pretraining, parameter_count
from fastvit_engine.models.resnet import ResNet
from fastvit_engine.models.timm_model import TimmModel
from fastvit_engine.models.vit import VisionTransformer, build_vit

AnyModel = ImageModel | TimmModel  # what a configuration may name

__all__ = [
    "AnyModel",
    "ImageModel",
    "ResNet",
    "TimmModel",
    "VisionTransformer",
    "build_for_training",
    "build_model",
    "build_vit",
    "computed_flops",
    "computed_macs",
    "forward_macs",
    "full_title",
    "is_for_pretraining",
    "model_title",
    "packed_flops",
    "parameter_count",
    "resolve_shape",
    "run_flops",
    "training_flops",
]
