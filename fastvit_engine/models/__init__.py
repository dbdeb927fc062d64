"""Vision Transformers by their paper names, and what one forward pass of them costs."""

from fastvit_engine.config.model_shape import model_title, resolve_shape
from fastvit_engine.models.flops import computed_flops, computed_macs, forward_macs, training_flops
from fastvit_engine.models.vit import VisionTransformer, build_vit, parameter_count

__all__ = [
    "VisionTransformer",
    "build_vit",
    "computed_flops",
    "computed_macs",
    "forward_macs",
    "model_title",
    "parameter_count",
    "resolve_shape",
    "training_flops",
]
