"""The gated MLP of DINOv2-g and DINOv3, by itself and as half of a pre-norm block."""

from fastvit_kernels.swiglu.op import layer_norm_swiglu, swiglu_mlp

__all__ = ["layer_norm_swiglu", "swiglu_mlp"]
