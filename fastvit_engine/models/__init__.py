"""Vision Transformers by their paper names, and what one forward pass of them costs."""

from fastvit_engine.config.model_shape import model_title, resolve_shape
from fastvit_engine.models.flops import computed_flops, computed_macs, forward_macs, run_flops, training_flops
from fastvit_engine.models.pretraining import build_for_training, is_for_pretraining, parameter_count
from fastvit_engine.models.vit import VisionTransformer, build_vit

__all__ = [
    "VisionTransformer",
    "build_for_training",
    "build_vit",
    "computed_flops",
    "computed_macs",
    "forward_macs",
    "is_for_pretraining",
    "model_title",
    "parameter_count",
    "resolve_shape",
    "run_flops",
    "training_flops",
]
