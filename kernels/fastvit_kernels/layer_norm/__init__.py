"""Layer normalisation, alone or fused with the residual addition before it."""

from fastvit_kernels.layer_norm.op import add_layer_norm, layer_norm

__all__ = ["add_layer_norm", "layer_norm"]
