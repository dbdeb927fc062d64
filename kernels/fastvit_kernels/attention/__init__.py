from fastvit_kernels.attention.op import attention, attention_qkv

__all__ = ["attention", "attention_qkv"]
