"""The attention half of a pre-norm block as one operator, residual included."""

from fastvit_kernels.attention_block.op import attention_block

__all__ = ["attention_block"]
