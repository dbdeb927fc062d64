"""Layers for the Hugging Face `kernels` package, whose `kernelize` gives modules the `forward` of one of these.

Such a layer is pure: no constructor, no state, no members but two flags. Its `self` is the module of the other
library, whose parameters and submodules it uses as they are at each call. If the operations of this package cannot do
what a call asks, the forward of the module's own class runs: for an attention mask, returned attention weights, another
activation than GELU, a hook inside an MLP, an input whose dtype differs from the weights'.
"""

from typing import Any

from torch import Tensor, nn

from fastvit_kernels.attention import attention_qkv
from fastvit_kernels.integrations.checks import (
    PLAIN_TENSORS,
    activation_name,
    asks,
    check_children,
    check_hooks,
    check_layer_norm,
    check_linear,
    fits,
)
from fastvit_kernels.layer_norm import layer_norm
from fastvit_kernels.mlp import Activation, mlp

GELUS: dict[str, Activation] = {  # of transformers.activations
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}


class LayerNorm(nn.Module):
    """For nn.LayerNorm over the last dimension: [..., D] -> [..., D]."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        norm: Any = self
        if check_layer_norm("the layer", norm, (type(norm),)) or not fits(input, norm.weight):
            return type(norm).forward(norm, input)
        return layer_norm(input, norm.weight, norm.bias, eps=norm.eps)


class MLP(nn.Module):
    """For the MLPs of ViT, DINOv2, CLIP, SigLIP and their kin in transformers: [..., D] -> [..., D].

    Reads the parameters of `fc1` and `fc2` without calling these layers.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        layer: Any = self
        activation = gelu_of(layer)
        if activation is None or not fits(hidden_states, layer.fc1.weight):
            return type(layer).forward(layer, hidden_states)
        fc1, fc2 = layer.fc1, layer.fc2
        return mlp(hidden_states, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=activation)


class ViTAttention(nn.Module):
    """For the attention of ViT, DINOv2 and their kin in transformers: [B, N, D] -> [B, N, D] and no weights."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer: Any = self
        qkv = queries_keys_values(layer, layer.scaling, hidden_states, attention_mask, kwargs)
        if qkv is None:
            return type(layer).forward(layer, hidden_states, attention_mask, **kwargs)
        attended = attention_qkv(*qkv, dropout=layer.attention_dropout if layer.training else 0.0)
        return layer.o_proj(attended), None


class SiglipAttention(nn.Module):
    """For the attention of SigLIP, CLIP and their kin in transformers: [B, N, D] -> [B, N, D] and no weights."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer: Any = self
        qkv = queries_keys_values(layer, layer.scale, hidden_states, attention_mask, kwargs)
        if qkv is None:
            return type(layer).forward(layer, hidden_states, attention_mask, **kwargs)
        attended = attention_qkv(*qkv, dropout=layer.dropout if layer.training else 0.0)
        return layer.out_proj(attended), None


def queries_keys_values(
    layer: Any, scale: float, x: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """q, k and v, each [B, N, H, d], by the layer's own projections; None if `attention_qkv` is not what is asked for.

    The eager implementation returns attention weights, which these kernels never have.
    """
    if (
        attention_mask is not None
        or layer.is_causal
        or scale != layer.head_dim**-0.5
        or layer.config._attn_implementation == "eager"
        or asks(options)
        or type(x) not in PLAIN_TENSORS
        or x.ndim != 3
    ):
        return None
    q, k, v = (linear(x).unflatten(-1, (-1, layer.head_dim)) for linear in (layer.q_proj, layer.k_proj, layer.v_proj))
    return q, k, v


def gelu_of(layer: Any) -> Activation | None:
    """The form of GELU if the layer is two linear ones with a GELU between them, and nothing else happens in it."""
    if check_children("the layer", layer, ("activation_fn", "fc1", "fc2")) or check_hooks(layer._modules):
        return None
    fc1, fc2, activation = layer.fc1, layer.fc2, type(layer.activation_fn)
    width, hidden, out = fc1.weight.shape[-1], len(fc1.weight), len(fc2.weight)
    if check_linear("fc1", fc1, width, hidden) or check_linear("fc2", fc2, hidden, out):
        return None
    if fc1.bias is None or fc2.bias is None:
        return None
    ours = activation.__module__ == "transformers.activations" and activation.__name__ in GELUS
    return GELUS[activation.__name__] if ours else activation_name(layer.activation_fn, {})
