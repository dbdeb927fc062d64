"""Layers of Hugging Face transformers (5.17 and later): ViT and its kin, DINOv2, DINOv3, the towers of CLIP and SigLIP.

Queries, keys and values are three Linear layers there. Their weights are packed at each call (see `AttentionHalf`), so
that the parameters, and with them state dicts and optimizers, stay three.
"""

import sys
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.utils import output_capturing

from fastvit_kernels.integrations.block import AttentionHalf, FusedBlock, GatedHalf, MlpHalf, RotaryHalf, Rotation
from fastvit_kernels.integrations.checks import (
    activation_name,
    asks,
    check_children,
    check_forward,
    check_hooks,
    check_layer_norm,
    check_linear,
    check_precision,
    check_rate,
    check_type,
    dropout_rate,
    exchanged_forward,
    in_force,
)
from fastvit_kernels.integrations.fused import Fused, base_class
from fastvit_kernels.mlp import Activation

GELUS: dict[type[nn.Module], Activation] = {
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
}
SILUS = (nn.SiLU, activations.SiLUActivation) if hasattr(activations, "SiLUActivation") else (nn.SiLU,)
GATED_MLP = ("act_fn", "gate_proj", "up_proj", "down_proj")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")  # one function, five ways


class Names(NamedTuple):
    """What a family calls its parts."""

    norms: tuple[str, str]
    attention: str
    out: str
    heads: str
    scaling: str
    dropout: str  # of the attention probabilities
    tails: tuple[tuple[str, ...], tuple[str, ...]]  # what each branch passes before it is added
    mlp: tuple[str, ...] = ("activation_fn", "fc1", "fc2")
    gated: str = "SwiGLUFFN"  # how the class of a gated MLP ends


VIT = Names(
    norms=("layernorm_before", "layernorm_after"),
    attention="attention",
    out="o_proj",
    heads="num_attention_heads",
    scaling="scaling",
    dropout="attention_dropout",
    tails=(("dropout",), ("dropout",)),
)
DINOV2 = VIT._replace(
    norms=("norm1", "norm2"),
    tails=(("layer_scale1", "drop_path"), ("layer_scale2", "drop_path")),
)
DINOV3 = DINOV2._replace(heads="num_heads", dropout="dropout", mlp=("act_fn", "up_proj", "down_proj"), gated="GatedMLP")
CLIP = Names(
    norms=("layer_norm1", "layer_norm2"),
    attention="self_attn",
    out="out_proj",
    heads="num_heads",
    scaling="scale",
    dropout="dropout",
    tails=((), ()),
)


class FusedLayer(FusedBlock):
    """A layer made of one norm, attention, one norm, MLP, as `names` says."""

    names: ClassVar[Names]

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if exchanged_forward(self):
            return super().forward(hidden_states, attention_mask, **kwargs)
        asked = attention_mask is not None or asks(kwargs)
        attention = "a mask or weights" if asked else self.attention_half(self)
        return self.run_layer(hidden_states, attention, attention_mask, **kwargs)

    def run_layer(
        self,
        hidden_states: Tensor,
        attention: AttentionHalf | RotaryHalf | str,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        layer: Any = self
        norm1, norm2 = (getattr(self, name) for name in self.names.norms)
        attend = getattr(self, self.names.attention)
        return self.run(
            hidden_states,
            attention,
            self.mlp_half(self),
            lambda x: self.tail(0, attend(norm1(x), attention_mask=attention_mask, **kwargs)[0]),
            lambda x: self.tail(1, layer.mlp(norm2(x))),
        )

    def tail(self, half: int, branch: Tensor) -> Tensor:
        for name in self.names.tails[half]:
            branch = getattr(self, name)(branch)
        return branch

    @classmethod
    def attention_half(cls, block: Any, training: bool | None = None) -> AttentionHalf | RotaryHalf | str:
        names = cls.names
        norm: Any = getattr(block, names.norms[0], None)
        attn: Any = getattr(block, names.attention, None)
        reason = (
            check_parts(block, names)
            or check_layer_norm(names.norms[0], norm, (nn.LayerNorm,))
            or check_sibling(names.attention, attn, block, "Attention")
            or check_forward(names.attention, attn)
            or check_children(names.attention, attn, ("q_proj", "k_proj", "v_proj", names.out))
            or check_attention(names, attn, norm.normalized_shape[0])
            or check_tail(block, names.tails[0])
            or check_hooks({names.norms[0]: norm} | tail_modules(block, names.tails[0]))
            or check_hooks(attn._modules)
            or check_recorded(names.attention, attn)
        )
        if reason:
            return reason
        if rate := in_force(getattr(attn, names.dropout), attn, training):
            return f"attention dropout {rate:g}"
        out, scale, dropout, drop_path = getattr(attn, names.out), *tail_values(block, names.tails[0], training)
        if reason := check_precision(norm, scale, out.weight) or check_rates(dropout, drop_path):
            return reason
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        return AttentionHalf(
            norm=norm,
            qkv_weights=tuple(linear.weight for linear in projections),
            qkv_biases=tuple(linear.bias for linear in projections),
            proj=out,
            heads=getattr(attn, names.heads),
            layer_scale=scale,
            dropout=dropout,
            drop_path=drop_path,
        )

    @classmethod
    def mlp_half(cls, block: Any, training: bool | None = None) -> MlpHalf | GatedHalf | str:
        names = cls.names
        norm: Any = getattr(block, names.norms[1], None)
        mlp: Any = getattr(block, "mlp", None)
        gated = check_sibling("mlp", mlp, block, names.gated) == ""  # of the giants of DINOv2 and DINOv3
        reason = (
            check_parts(block, names)
            or check_layer_norm(names.norms[1], norm, (nn.LayerNorm,))
            or ("" if gated else check_sibling("mlp", mlp, block, "MLP"))
            or check_forward("mlp", mlp)
            or check_children("mlp", mlp, GATED_MLP if gated else names.mlp)
            or check_layers(mlp, GATED_MLP if gated else names.mlp, norm.normalized_shape[0])
            or check_tail(block, names.tails[1])
            or check_hooks({names.norms[1]: norm, "mlp": mlp} | tail_modules(block, names.tails[1]))
            or check_hooks(mlp._modules)
        )
        if reason:
            return reason
        scale, dropout, drop_path = tail_values(block, names.tails[1], training)
        if dropout:
            return f"dropout {dropout:g} on the output of the MLP but not inside it"
        act, fc1, *_, fc2 = (getattr(mlp, part) for part in (GATED_MLP if gated else names.mlp))
        if reason := check_precision(norm, scale, fc2.weight) or check_rates(dropout, drop_path):
            return reason
        if gated:
            reason = check_type("the activation of the gate", act, SILUS)
            return reason or GatedHalf(norm, (fc1, mlp.up_proj), fc2, scale, drop_path)
        activation = activation_name(act, GELUS)
        if activation is None:
            return f"activation {type(act).__name__}"
        return MlpHalf(norm, fc1, fc2, activation, scale, dropout, drop_path)


class ViTLayer(FusedLayer):
    """Layers with the names of ViT: DeiT, ViTMAE, ViTMSN and I-JEPA too."""

    names = VIT


class Dinov2Layer(FusedLayer):
    """Layers of DINOv2, with and without registers."""

    names = DINOV2


class Dinov3Layer(FusedLayer):
    """Layers of DINOv3: those of DINOv2 with rotary position embedding."""

    names = DINOV3

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        passed = {"position_embeddings": position_embeddings, **kwargs}
        if exchanged_forward(self):
            return super().forward(hidden_states, attention_mask, **passed)
        attention = self.attention_half(self)
        if attention_mask is not None or asks(kwargs):
            attention = "a mask or weights"
        elif not isinstance(attention, str):
            attention = rotated(attention, position_embeddings, hidden_states)
        return self.run_layer(hidden_states, attention, attention_mask, **passed)

    @classmethod
    def attention_half(cls, block: Any, training: bool | None = None) -> RotaryHalf | str:
        half = super().attention_half(block, training)
        return RotaryHalf(half, None, None, None) if isinstance(half, AttentionHalf) else str(half)


def rotated(half: RotaryHalf, cosines_and_sines: tuple[Tensor, Tensor] | None, x: Tensor) -> RotaryHalf | str:
    """With the angles of the last tokens, the patches: [patches, d] each."""
    if cosines_and_sines is None or any(angles.ndim != 2 for angles in cosines_and_sines):
        return "no rotation that all samples and heads share"
    cos, sin = cosines_and_sines
    return half._replace(rotation=Rotation(sin, cos, x.shape[1] - sin.shape[0], "half"))


class ClipLayer(FusedLayer):
    """Layers with the names of CLIP: MetaCLIP 2, SigLIP and SigLIP 2 too."""

    names = CLIP


FAMILIES: dict[str, tuple[str, type[FusedLayer]]] = {
    "vit": ("ViTLayer", ViTLayer),
    "deit": ("DeiTLayer", ViTLayer),
    "vit_mae": ("ViTMAELayer", ViTLayer),
    "vit_msn": ("ViTMSNLayer", ViTLayer),
    "ijepa": ("IJepaLayer", ViTLayer),
    "dinov2": ("Dinov2Layer", Dinov2Layer),
    "dinov2_with_registers": ("Dinov2WithRegistersLayer", Dinov2Layer),
    "dinov3_vit": ("DINOv3ViTLayer", Dinov3Layer),
    "clip": ("CLIPEncoderLayer", ClipLayer),
    "metaclip_2": ("MetaClip2EncoderLayer", ClipLayer),
    "siglip": ("SiglipEncoderLayer", ClipLayer),
    "siglip2": ("Siglip2EncoderLayer", ClipLayer),
}


def classes() -> dict[type[nn.Module], type[Fused]]:
    """Of the families in use; transformers imports each on demand. Layers of old versions return tuples: not those."""
    found: dict[type[nn.Module], type[Fused]] = {}
    for family, (name, mixin) in FAMILIES.items():
        modeling = sys.modules.get(f"transformers.models.{family}.modeling_{family}")
        layer = getattr(modeling, name, None)
        if layer is not None and layer.forward.__annotations__.get("return") in (Tensor, torch.FloatTensor):
            found[layer] = mixin
    return found


def check_parts(layer: nn.Module, names: Names) -> str:
    known = {*names.norms, names.attention, "mlp", *names.tails[0], *names.tails[1]}
    for name in known:
        if not isinstance(getattr(layer, name, None), nn.Module):
            return f"the layer has no {name!r}"
    return check_children("the layer", layer, known)


def check_sibling(name: str, module: nn.Module, layer: nn.Module, kind: str) -> str:
    """Whether the module is of the class that the file of its layer defines for it: ViTAttention for a ViTLayer."""
    own, whole = base_class(module), base_class(layer)
    expected = whole.__name__.removesuffix("Layer").removesuffix("Encoder") + kind
    same = own.__module__ == whole.__module__ and own.__name__.lower() == expected.lower()  # DINOv3's Dinov3ViTDropPath
    return "" if same else f"{name} is {own.__name__}"


def check_layers(mlp: Any, names: tuple[str, ...], width: int) -> str:
    """Of an MLP with these parts: the activation, layers from `width` to another, and one back."""
    *first, last = names[1:]
    if reason := check_type(f"mlp.{last}", getattr(mlp, last), (nn.Linear,)):
        return reason
    hidden = getattr(mlp, last).in_features
    for name in first:
        if reason := check_linear(f"mlp.{name}", getattr(mlp, name), width, hidden):
            return reason
    return check_linear(f"mlp.{last}", getattr(mlp, last), hidden, width)


def check_attention(names: Names, attn: Any, width: int) -> str:
    if getattr(attn, names.heads) * attn.head_dim != width or getattr(attn, names.scaling) != attn.head_dim**-0.5:
        return "heads of a width or scale of their own"
    if attn.is_causal:
        return "attention is causal"
    if attn.config._attn_implementation not in ATTENTIONS:
        return f"attention implementation {attn.config._attn_implementation!r}"
    for linear in ("q_proj", "k_proj", "v_proj", names.out):
        if reason := check_linear(f"{names.attention}.{linear}", getattr(attn, linear), width, width):
            return reason
    return ""


def check_tail(layer: nn.Module, tail: tuple[str, ...]) -> str:
    for name in tail:
        module = getattr(layer, name)
        if name == "dropout":
            reason = check_type(name, module, (nn.Dropout,))
        elif name == "drop_path" and base_class(module) is nn.Identity:
            reason = ""
        else:
            reason = check_sibling(name, module, layer, "DropPath" if name == "drop_path" else "LayerScale")
        if reason:
            return reason
    return ""


def tail_modules(layer: nn.Module, tail: tuple[str, ...]) -> dict[str, nn.Module]:
    return {name: getattr(layer, name) for name in tail}


def tail_values(layer: Any, tail: tuple[str, ...], training: bool | None) -> tuple[Tensor | None, float, float]:
    """The layer scale, the dropout rate and the drop path rate of a branch."""
    scales = [getattr(layer, name).lambda1 for name in tail if name.startswith("layer_scale")]
    dropout = dropout_rate(layer.dropout, training) if "dropout" in tail else 0.0
    drop_path = dropout_rate(layer.drop_path, training) if "drop_path" in tail else 0.0
    return scales[0] if scales else None, dropout, drop_path


def check_rates(dropout: float, drop_path: float) -> str:
    return check_rate("dropout", dropout) or check_rate("drop_path", drop_path)


def check_recorded(name: str, attn: nn.Module) -> str:
    """The recording hooks that a first request leaves on attention do nothing unless a later call asks again."""
    if any(hook.__module__ != output_capturing.__name__ for hook in attn._forward_hooks.values()):
        return f"{name} has a hook"
    if attn._forward_hooks:
        recording = output_capturing._active_collector.get() or {}
        if any(key not in ("hidden_states", "_hidden_states_layers") for key in recording):
            return "attentions are asked for"
    return check_hooks({name: attn}, but_forward=True)
