"""A pre-norm Transformer block as one operator."""

from fastvit_kernels.block.op import transformer_block

__all__ = ["transformer_block"]
