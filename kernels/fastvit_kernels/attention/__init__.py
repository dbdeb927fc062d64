from fastvit_kernels.attention.op import attention

__all__ = ["attention"]
