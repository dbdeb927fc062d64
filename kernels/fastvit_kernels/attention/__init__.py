from fastvit_kernels.attention.op import attention, attention_block

__all__ = ["attention", "attention_block"]
