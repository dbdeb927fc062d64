from fastvit_kernels.mlp.op import Activation, layer_norm_mlp

__all__ = ["Activation", "layer_norm_mlp"]
