"""Vision Transformer building blocks: functions on tensors, and modules with timm's parameter names."""

from fastvit_kernels import flops as _flops  # noqa: F401, its formulas register themselves
from fastvit_kernels.attention import attention, attention_qkv
from fastvit_kernels.attention_block import attention_block
from fastvit_kernels.block import transformer_block
from fastvit_kernels.cross_entropy import cross_entropy, sigmoid_cross_entropy
from fastvit_kernels.dispatch import explain
from fastvit_kernels.fp8.op import fp8_linear
from fastvit_kernels.fp8.setting import Fp8
from fastvit_kernels.integrations import accelerate, restore
from fastvit_kernels.layer_norm import add_layer_norm, layer_norm
from fastvit_kernels.mlp import layer_norm_mlp, mlp
from fastvit_kernels.modules import (
    FusedAttention,
    FusedBlock,
    FusedCrossEntropy,
    FusedLayerNorm,
    FusedLayerNormMLP,
    FusedLayerNormSwiGLU,
    FusedPatchEmbed,
    FusedSwiGLU,
)
from fastvit_kernels.patch_embed import patch_embed
from fastvit_kernels.residual import drop_path_subset
from fastvit_kernels.rotary import rotary_qk_norm, rotary_qk_norm_separate
from fastvit_kernels.swiglu import layer_norm_swiglu, swiglu_mlp

__version__ = "0.1.0"

__all__ = [
    "Fp8",
    "FusedAttention",
    "FusedBlock",
    "FusedCrossEntropy",
    "FusedLayerNorm",
    "FusedLayerNormMLP",
    "FusedLayerNormSwiGLU",
    "FusedPatchEmbed",
    "FusedSwiGLU",
    "accelerate",
    "add_layer_norm",
    "attention",
    "attention_block",
    "attention_qkv",
    "cross_entropy",
    "drop_path_subset",
    "explain",
    "fp8_linear",
    "layer_norm",
    "layer_norm_mlp",
    "layer_norm_swiglu",
    "mlp",
    "patch_embed",
    "restore",
    "rotary_qk_norm",
    "rotary_qk_norm_separate",
    "sigmoid_cross_entropy",
    "swiglu_mlp",
    "transformer_block",
]
