"""Normalisation of queries and keys and rotary position embedding, in one pass between the projection and attention."""

from fastvit_kernels.rotary.op import rotary_qk_norm, rotary_qk_norm_separate

__all__ = ["rotary_qk_norm", "rotary_qk_norm_separate"]
