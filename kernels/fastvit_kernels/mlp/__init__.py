"""The MLP half of a pre-norm block as one operator, residual included."""

from fastvit_kernels.mlp.op import Activation, layer_norm_mlp

__all__ = ["Activation", "layer_norm_mlp"]
