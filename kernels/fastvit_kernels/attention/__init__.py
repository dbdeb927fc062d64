"""Multi-head attention: softmax(q k^T / sqrt(d) + bias) v."""

from fastvit_kernels.attention.op import attention, attention_qkv
from fastvit_kernels.attention.relative import relative_bias

__all__ = ["attention", "attention_qkv", "relative_bias"]
