"""Blocks of timm's Vision Transformers."""

from typing import Any

from timm.layers import activations
from timm.layers import mlp as mlps
from timm.layers import norm as norms
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from fastvit_kernels.integrations.block import AttentionHalf, FusedBlock, GatedHalf, MlpHalf, RotaryHalf
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
from fastvit_kernels.integrations.fused import Fused, base_class
from fastvit_kernels.integrations.layers import FusedLayerNorm
from fastvit_kernels.mlp import Activation

OWN_LAYER_NORMS = tuple(getattr(norms, name) for name in ("LayerNorm", "LayerNormFp32") if hasattr(norms, name))
LAYER_NORMS = (nn.LayerNorm, *OWN_LAYER_NORMS)
GELUS: dict[type[nn.Module], Activation] = {activations.GELU: "gelu", activations.GELUTanh: "gelu_tanh"}
MLPS = (timm_vit.Mlp, mlps.GluMlp, mlps.SwiGLU)
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
    def attention_half(cls, block: Any, training: bool | None = None) -> AttentionHalf | RotaryHalf | str:
        norm, attn, scale = block.norm1, block.attn, block.ls1
        reason = (
            check_children("the block", block, BLOCK)
            or check_wish(block)
            or check_layer_norm("norm1", norm, LAYER_NORMS)
            or check_type("attn", attn, (timm_vit.Attention,))
            or check_forward("attn", attn)
            or check_children("attn", attn, ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"))
            or check_identity("attn.norm", getattr(attn, "norm", nn.Identity()))
            or check_heads(attn, norm.normalized_shape[0])
            or check_qk_norm(attn, attn.proj.weight)
            or check_residual("ls1", scale, "drop_path1", block.drop_path1)
            or check_precision(norm, getattr(scale, "gamma", None), attn.proj.weight)
            or check_hooks({"norm1": norm, "attn": attn, "ls1": scale, "drop_path1": block.drop_path1})
            or check_hooks(attn._modules)
        )
        rates = reason or attention_rates(block, training)
        if isinstance(rates, str):
            return rates
        dropout, drop_path = rates
        half = AttentionHalf(
            norm=norm,
            qkv_weights=(attn.qkv.weight,),
            qkv_biases=(attn.qkv.bias,),
            proj=attn.proj,
            heads=attn.num_heads,
            layer_scale=getattr(scale, "gamma", None),
            dropout=dropout,
            drop_path=drop_path,
        )
        return half if base_class(attn.q_norm) is nn.Identity else RotaryHalf(half, attn.q_norm, attn.k_norm, None)

    @classmethod
    def mlp_half(cls, block: Any, training: bool | None = None) -> MlpHalf | GatedHalf | str:
        scale = block.ls2
        reason = (
            check_children("the block", block, BLOCK)
            or check_wish(block)
            or check_residual("ls2", scale, "drop_path2", block.drop_path2)
            or check_hooks({"ls2": scale})
        )
        return reason or read_mlp(block, getattr(scale, "gamma", None), training)


def attention_rates(block: Any, training: bool | None) -> tuple[float, float] | str:
    """The rates at which a block drops projected attention, and its attention half; or why that cannot run fused."""
    attn = block.attn
    for name in ("attn_drop", "proj_drop"):
        if reason := check_type(f"attn.{name}", getattr(attn, name), (nn.Dropout,)):
            return reason
    if rate := dropout_rate(attn.attn_drop, training):
        return f"attention dropout {rate:g}"
    dropout, drop_path = dropout_rate(attn.proj_drop, training), dropout_rate(block.drop_path1, training)
    return check_rate("attn.proj_drop", dropout) or check_rate("drop_path1", drop_path) or (dropout, drop_path)


def read_mlp(block: Any, layer_scale: Tensor | None, training: bool | None) -> MlpHalf | GatedHalf | str:
    """What the modules norm2, mlp and drop_path2 of a block are."""
    norm, mlp = block.norm2, block.mlp
    reason = (
        check_layer_norm("norm2", norm, LAYER_NORMS)
        or check_type("mlp", mlp, MLPS)
        or check_forward("mlp", mlp)
        or check_children("mlp", mlp, ("act", "drop1", "norm", "fc2", "drop2", *first_layers(mlp)))
        or check_identity("mlp.norm", getattr(mlp, "norm", nn.Identity()))
        or check_layers(mlp, norm.normalized_shape[0])
        or check_type("mlp.drop1", mlp.drop1, (nn.Dropout,))
        or check_type("mlp.drop2", mlp.drop2, (nn.Dropout,))
        or check_precision(norm, layer_scale, mlp.fc2.weight)
        or check_hooks({"norm2": norm, "mlp": mlp, "drop_path2": block.drop_path2})
        or check_hooks(mlp._modules)
    )
    if reason:
        return reason
    dropout, drop_path = dropout_rate(mlp.drop1, training), dropout_rate(block.drop_path2, training)
    if dropout != dropout_rate(mlp.drop2, training):
        return "two different dropout rates"
    if reason := check_rate("mlp.drop1", dropout) or check_rate("drop_path2", drop_path):
        return reason
    if base_class(mlp) is not timm_vit.Mlp:
        reason = check_gate(mlp) or (f"dropout {dropout:g} in a gated MLP" if dropout else "")
        return reason or GatedHalf(norm, tuple(first_layers(mlp).values()), mlp.fc2, layer_scale, drop_path)
    activation = activation_name(mlp.act, GELUS)
    if activation is None:
        return f"activation {type(mlp.act).__name__}"
    return MlpHalf(norm, mlp.fc1, mlp.fc2, activation, layer_scale, dropout, drop_path)


def first_layers(mlp: Any) -> dict[str, Any]:
    """What comes before the activation in an MLP of one of the classes in MLPS."""
    names = ("fc1_g", "fc1_x") if base_class(mlp) is mlps.SwiGLU else ("fc1",)
    return {name: getattr(mlp, name) for name in names}


def check_layers(mlp: Any, width: int) -> str:
    if reason := check_type("mlp.fc2", mlp.fc2, (nn.Linear,)):
        return reason
    hidden = mlp.fc2.in_features
    packed = 2 if base_class(mlp) is mlps.GluMlp else 1
    for name, layer in first_layers(mlp).items():
        if reason := check_linear(f"mlp.{name}", layer, width, packed * hidden):
            return reason
    return check_linear("mlp.fc2", mlp.fc2, hidden, width)


def check_gate(mlp: Any) -> str:
    """Whether a GluMlp or SwiGLU computes fc2(silu(gate) * value), with the gate first."""
    if getattr(mlp, "gate_last", False):
        return "the gate comes last"
    return check_type("the activation of the gate", mlp.act, (nn.SiLU,))


def check_wish(block: Any) -> str:
    """timm's switch for attention in single steps, set by those who need a second derivative or the attention map."""
    return "" if getattr(block.attn, "fused_attn", True) else "attn.fused_attn is off, a wish for timm's own code"


def check_heads(attn: Any, width: int) -> str:
    if attn.num_heads * attn.head_dim != width or attn.scale != attn.head_dim**-0.5:
        return "heads of a width or scale of their own"
    return check_linear("attn.qkv", attn.qkv, width, 3 * width) or check_linear("attn.proj", attn.proj, width, width)


def check_qk_norm(attn: Any, weight: Tensor) -> str:
    """Whether queries and keys are normalised by a LayerNorm each, over a head, or not at all."""
    norms = {"attn.q_norm": attn.q_norm, "attn.k_norm": attn.k_norm}
    if all(base_class(norm) is nn.Identity for norm in norms.values()):
        return ""
    for name, norm in norms.items():
        if reason := check_layer_norm(name, norm, LAYER_NORMS) or check_precision(norm, None, weight):
            return reason
    if attn.q_norm.eps != attn.k_norm.eps:
        return "attn.q_norm and attn.k_norm differ in eps"
    return ""


def check_residual(scale_name: str, scale: nn.Module, drop_name: str, drop_path: Any) -> str:
    reason = check_type(scale_name, scale, (nn.Identity, timm_vit.LayerScale))
    return reason or check_drop_path(drop_name, drop_path)


def check_drop_path(name: str, drop_path: Any) -> str:
    if reason := check_type(name, drop_path, (nn.Identity, timm_vit.DropPath)):
        return reason
    return "" if getattr(drop_path, "scale_by_keep", True) else f"{name} does not rescale what it keeps"
