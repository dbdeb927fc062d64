from fastvit_kernels.layer_norm.op import add_layer_norm, layer_norm

__all__ = ["add_layer_norm", "layer_norm"]
