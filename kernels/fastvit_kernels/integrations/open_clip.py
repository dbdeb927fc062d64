"""Blocks of open_clip's transformers, of the image tower and, with their causal mask, of the text tower."""

from typing import Any

import torch
from open_clip import transformer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.weak import WeakTensorKeyDictionary

from fastvit_kernels.integrations.block import AttentionHalf, FusedBlock, MlpHalf
from fastvit_kernels.integrations.checks import (
    activation_name,
    check_children,
    check_forward,
    check_hooks,
    check_layer_norm,
    check_linear,
    check_precision,
    check_tensor,
    check_type,
    exchanged_forward,
    in_force,
)
from fastvit_kernels.integrations.fused import Fused
from fastvit_kernels.integrations.layers import FusedLayerNorm

LAYER_NORMS = (nn.LayerNorm, transformer.LayerNorm, transformer.LayerNormFp32)
LAYER_SCALES = (nn.Identity, transformer.LayerScale)
BLOCK = ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2")


def classes() -> dict[type[nn.Module], type[Fused]]:
    return {
        transformer.ResidualAttentionBlock: OpenClipBlock,
        transformer.LayerNorm: FusedLayerNorm,
        transformer.LayerNormFp32: FusedLayerNorm,
    }


_looked_at = WeakTensorKeyDictionary()  # masks, and for each of their views whether it is causal


def is_causal(mask: Tensor, tokens: int) -> bool:
    """Whether the mask is an additive one [N, N] that hides from each token those behind it, and nothing else.

    Every layer is given a view of the same buffer: its numbers are read once, for which a GPU has to be waited for. A
    compiler cannot read them, so under torch.compile no mask is known to be causal.
    """
    if torch.compiler.is_compiling() or type(mask) is not Tensor or mask.is_meta or mask.is_inference():
        return False
    if mask.shape != (tokens, tokens) or not mask.is_floating_point() or mask.requires_grad:
        return False
    views = _looked_at.setdefault(mask if mask._base is None else mask._base, {})
    view = (mask._version, mask.storage_offset(), mask.shape, mask.stride())
    if view not in views:
        views[view] = torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1))
    return views[view]


class OpenClipBlock(FusedBlock):
    """open_clip's `ResidualAttentionBlock`, with either half fused if it can be."""

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        block: Any = self
        if k_x is not None or v_x is not None or exchanged_forward(self):
            return super().forward(q_x, k_x, v_x, attn_mask)
        attention, mlp = self.attention_half(self), self.mlp_half(self)
        if not isinstance(attention, str) and attn_mask is not None:
            causal = attention.accepts(q_x) and is_causal(attn_mask, q_x.shape[1])
            attention = attention._replace(causal=True) if causal else "a mask"
        return self.run(
            q_x,
            attention,
            mlp,
            lambda x: block.ls_1(block.attention(q_x=block.ln_1(x), attn_mask=attn_mask)),
            lambda x: block.ls_2(block.mlp(block.ln_2(x))),
        )

    @classmethod
    def attention_half(cls, block: Any, training: bool | None = None) -> AttentionHalf | str:
        norm, attn, scale = block.ln_1, block.attn, block.ls_1
        reason = (
            check_children("the block", block, BLOCK)
            or check_layer_norm("ln_1", norm, LAYER_NORMS)
            or check_type("attn", attn, (nn.MultiheadAttention,))
            or check_forward("attn", attn)
            or check_packed(attn, norm.normalized_shape[0])
            or check_type("ls_1", scale, LAYER_SCALES)
            or check_precision(norm, getattr(scale, "gamma", None), attn.out_proj.weight)
            or check_hooks({"ln_1": norm, "attn": attn, "attn.out_proj": attn.out_proj, "ls_1": scale})
        )
        if reason:
            return reason
        if rate := in_force(attn.dropout, attn, training):
            return f"attention dropout {rate:g}"
        return AttentionHalf(
            norm=norm,
            qkv_weights=(attn.in_proj_weight,),
            qkv_biases=(attn.in_proj_bias,),
            proj=attn.out_proj,
            heads=attn.num_heads,
            layer_scale=getattr(scale, "gamma", None),
            dropout=0.0,
            drop_path=0.0,
        )

    @classmethod
    def mlp_half(cls, block: Any, training: bool | None = None) -> MlpHalf | str:
        norm, mlp, scale = block.ln_2, block.mlp, block.ls_2
        reason = (
            check_children("the block", block, BLOCK)
            or check_layer_norm("ln_2", norm, LAYER_NORMS)
            or check_type("mlp", mlp, (nn.Sequential,))
            or ("" if list(mlp._modules) == ["c_fc", "gelu", "c_proj"] else "mlp has parts that are not known here")
            or check_type("mlp.c_fc", mlp.c_fc, (nn.Linear,))
            or check_linear("mlp.c_fc", mlp.c_fc, norm.normalized_shape[0], mlp.c_fc.out_features)
            or check_linear("mlp.c_proj", mlp.c_proj, mlp.c_fc.out_features, norm.normalized_shape[0])
            or check_type("ls_2", scale, LAYER_SCALES)
            or check_precision(norm, getattr(scale, "gamma", None), mlp.c_fc.weight)
            or check_hooks({"ln_2": norm, "mlp": mlp, "ls_2": scale})
            or check_hooks(mlp._modules)
        )
        if reason:
            return reason
        activation = activation_name(mlp.gelu, {})
        if activation is None:
            return f"activation {type(mlp.gelu).__name__}"
        return MlpHalf(norm, mlp.c_fc, mlp.c_proj, activation, getattr(scale, "gamma", None), 0.0, 0.0)


def check_packed(attn: nn.MultiheadAttention, width: int) -> str:
    if not attn.batch_first:
        return "attn takes the batch second"
    if attn.embed_dim != width or attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
        return "attn has keys and values of its own"
    if reason := check_type("attn.out_proj", attn.out_proj, (NonDynamicallyQuantizableLinear,)):
        return reason
    return check_tensor("attn.in_proj_weight", attn.in_proj_weight) or check_tensor(
        "attn.out_proj.weight", attn.out_proj.weight
    )
