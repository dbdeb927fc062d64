"""Multi-head attention: softmax(q k^T / sqrt(d) + bias) v."""

from fastvit_kernels.attention.op import attention, attention_qkv

__all__ = ["attention", "attention_qkv"]
