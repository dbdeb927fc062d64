"""The MLP of a Transformer block: its half of a pre-norm block as one operator, residual included, and alone."""

from fastvit_kernels.mlp.op import Activation, layer_norm_mlp
from fastvit_kernels.mlp.pure import mlp

__all__ = ["Activation", "layer_norm_mlp", "mlp"]
