"""Blocks of timm's Vision Transformers."""

from typing import Any

from timm.layers import activations
from timm.layers import norm as norms
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from fastvit_kernels.integrations.block import AttentionHalf, FusedBlock, MlpHalf
from fastvit_kernels.integrations.checks import (
    activation_name,
    check_children,
    check_forward,
    check_hooks,
    check_identity,
    check_layer_norm,
    check_linear,
    check_precision,
    check_rate,
    check_type,
    dropout_rate,
    exchanged_forward,
)
from fastvit_kernels.integrations.fused import Fused
from fastvit_kernels.integrations.layers import FusedLayerNorm
from fastvit_kernels.mlp import Activation

OWN_LAYER_NORMS = tuple(getattr(norms, name) for name in ("LayerNorm", "LayerNormFp32") if hasattr(norms, name))
LAYER_NORMS = (nn.LayerNorm, *OWN_LAYER_NORMS)
GELUS: dict[type[nn.Module], Activation] = {activations.GELU: "gelu", activations.GELUTanh: "gelu_tanh"}
BLOCK = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")


def classes() -> dict[type[nn.Module], type[Fused]]:
    return {timm_vit.Block: TimmBlock} | dict.fromkeys(OWN_LAYER_NORMS, FusedLayerNorm)


class TimmBlock(FusedBlock):
    """timm's `Block`, with either half fused if it can be."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        block: Any = self
        if exchanged_forward(self):
            return super().forward(x, *args, **kwargs)
        attention, mlp = self.attention_half(self), self.mlp_half(self)
        masked = any(option is not None and option is not False for option in (*args, *kwargs.values()))
        return self.run(
            x,
            "a mask" if masked else attention,
            mlp,
            lambda x: block.drop_path1(block.ls1(block.attn(block.norm1(x), *args, **kwargs))),
            lambda x: block.drop_path2(block.ls2(block.mlp(block.norm2(x)))),
        )

    @classmethod
    def attention_half(cls, block: Any, training: bool | None = None) -> AttentionHalf | str:
        norm, attn, scale = block.norm1, block.attn, block.ls1
        reason = (
            check_children("the block", block, BLOCK)
            or check_wish(block)
            or check_layer_norm("norm1", norm, LAYER_NORMS)
            or check_type("attn", attn, (timm_vit.Attention,))
            or check_forward("attn", attn)
            or check_children("attn", attn, ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"))
            or check_identity("attn.q_norm", attn.q_norm)
            or check_identity("attn.k_norm", attn.k_norm)
            or check_identity("attn.norm", getattr(attn, "norm", nn.Identity()))
            or check_heads(attn, norm.normalized_shape[0])
            or check_residual("ls1", scale, "drop_path1", block.drop_path1)
            or check_type("attn.attn_drop", attn.attn_drop, (nn.Dropout,))
            or check_type("attn.proj_drop", attn.proj_drop, (nn.Dropout,))
            or check_precision(norm, getattr(scale, "gamma", None), attn.proj.weight)
            or check_hooks({"norm1": norm, "attn": attn, "ls1": scale, "drop_path1": block.drop_path1})
            or check_hooks(attn._modules)
        )
        if reason:
            return reason
        if rate := dropout_rate(attn.attn_drop, training):
            return f"attention dropout {rate:g}"
        dropout, drop_path = dropout_rate(attn.proj_drop, training), dropout_rate(block.drop_path1, training)
        if reason := check_rate("attn.proj_drop", dropout) or check_rate("drop_path1", drop_path):
            return reason
        return AttentionHalf(
            norm=norm,
            qkv_weights=(attn.qkv.weight,),
            qkv_biases=(attn.qkv.bias,),
            proj=attn.proj,
            heads=attn.num_heads,
            layer_scale=getattr(scale, "gamma", None),
            dropout=dropout,
            drop_path=drop_path,
        )

    @classmethod
    def mlp_half(cls, block: Any, training: bool | None = None) -> MlpHalf | str:
        norm, mlp, scale = block.norm2, block.mlp, block.ls2
        reason = (
            check_children("the block", block, BLOCK)
            or check_wish(block)
            or check_layer_norm("norm2", norm, LAYER_NORMS)
            or check_type("mlp", mlp, (timm_vit.Mlp,))
            or check_forward("mlp", mlp)
            or check_children("mlp", mlp, ("fc1", "act", "drop1", "norm", "fc2", "drop2"))
            or check_identity("mlp.norm", getattr(mlp, "norm", nn.Identity()))
            or check_type("mlp.fc1", mlp.fc1, (nn.Linear,))
            or check_linear("mlp.fc1", mlp.fc1, norm.normalized_shape[0], mlp.fc1.out_features)
            or check_linear("mlp.fc2", mlp.fc2, mlp.fc1.out_features, norm.normalized_shape[0])
            or check_residual("ls2", scale, "drop_path2", block.drop_path2)
            or check_type("mlp.drop1", mlp.drop1, (nn.Dropout,))
            or check_type("mlp.drop2", mlp.drop2, (nn.Dropout,))
            or check_precision(norm, getattr(scale, "gamma", None), mlp.fc1.weight)
            or check_hooks({"norm2": norm, "mlp": mlp, "ls2": scale, "drop_path2": block.drop_path2})
            or check_hooks(mlp._modules)
        )
        if reason:
            return reason
        activation = activation_name(mlp.act, GELUS)
        if activation is None:
            return f"activation {type(mlp.act).__name__}"
        dropout, drop_path = dropout_rate(mlp.drop1, training), dropout_rate(block.drop_path2, training)
        if dropout != dropout_rate(mlp.drop2, training):
            return "two different dropout rates"
        if reason := check_rate("mlp.drop1", dropout) or check_rate("drop_path2", drop_path):
            return reason
        return MlpHalf(norm, mlp.fc1, mlp.fc2, activation, getattr(scale, "gamma", None), dropout, drop_path)


def check_wish(block: Any) -> str:
    """timm's switch for attention in single steps, set by those who need a second derivative or the attention map."""
    return "" if getattr(block.attn, "fused_attn", True) else "attn.fused_attn is off, a wish for timm's own code"


def check_heads(attn: Any, width: int) -> str:
    if attn.num_heads * attn.head_dim != width or attn.scale != attn.head_dim**-0.5:
        return "heads of a width or scale of their own"
    return check_linear("attn.qkv", attn.qkv, width, 3 * width) or check_linear("attn.proj", attn.proj, width, width)


def check_residual(scale_name: str, scale: nn.Module, drop_name: str, drop_path: Any) -> str:
    return (
        check_type(scale_name, scale, (nn.Identity, timm_vit.LayerScale))
        or check_type(drop_name, drop_path, (nn.Identity, timm_vit.DropPath))
        or ("" if getattr(drop_path, "scale_by_keep", True) else f"{drop_name} does not rescale what it keeps")
    )
