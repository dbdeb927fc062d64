"""Blocks with rotary position embedding of timm's EVA, EVA-02 and DINOv3."""

from typing import Any

import torch
from timm.models import eva
from torch import Tensor, nn

from fastvit_kernels.integrations.block import AttentionHalf, FusedBlock, GatedHalf, MlpHalf, RotaryHalf, Rotation
from fastvit_kernels.integrations.checks import (
    check_children,
    check_forward,
    check_hooks,
    check_identity,
    check_layer_norm,
    check_linear,
    check_precision,
    check_tensor,
    check_type,
    exchanged_forward,
)
from fastvit_kernels.integrations.fused import Fused, base_class
from fastvit_kernels.integrations.timm import (
    LAYER_NORMS,
    attention_rates,
    check_drop_path,
    check_qk_norm,
    check_wish,
    read_mlp,
)
from fastvit_kernels.rotary.op import Layout

BLOCK = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
ATTENTION = ("qkv", *PROJECTIONS, "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")


def classes() -> dict[type[nn.Module], type[Fused]]:
    return {eva.EvaBlock: EvaBlock}


class EvaBlock(FusedBlock):
    """timm's `EvaBlock`, with either half fused if it can be."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        block: Any = self
        if exchanged_forward(self):
            return super().forward(x, rope, attn_mask, *args, **kwargs)
        attention = self.attention_half(self)
        if attn_mask is not None or any(
            option is not None and option is not False for option in (*args, *kwargs.values())
        ):
            attention = "a mask"
        elif not isinstance(attention, str):
            attention = without_rotation(attention) if rope is None else with_rotation(attention, rope, block.attn)
        return self.run(
            x,
            attention,
            self.mlp_half(self),
            lambda x: block.drop_path1(
                scaled(block.attn(block.norm1(x), rope, attn_mask, *args, **kwargs), block.gamma_1)
            ),
            lambda x: block.drop_path2(scaled(block.mlp(block.norm2(x)), block.gamma_2)),
        )

    @classmethod
    def within(cls, module: nn.Module, model: nn.Module) -> type[Fused]:
        for parent in model.modules():
            if isinstance(parent, eva.Eva) and parent.rope is None and module in parent.blocks.children():
                return UnrotatedBlock
        return cls

    @classmethod
    def attention_half(cls, block: Any, training: bool | None = None) -> AttentionHalf | RotaryHalf | str:
        norm, attn = block.norm1, block.attn
        reason = (
            check_children("the block", block, BLOCK)
            or check_wish(block)
            or check_layer_norm("norm1", norm, LAYER_NORMS)
            or check_type("attn", attn, (eva.EvaAttention,))
            or check_forward("attn", attn)
            or check_children("attn", attn, ATTENTION)
            or check_identity("attn.norm", attn.norm)
            or ("attn is gated" if getattr(attn, "gate", None) is not None else "")
            or check_projections(attn, norm.normalized_shape[0])
            or check_qk_norm(attn, attn.proj.weight)
            or check_drop_path("drop_path1", block.drop_path1)
            or check_precision(norm, block.gamma_1, attn.proj.weight)
            or check_hooks({"norm1": norm, "attn": attn, "drop_path1": block.drop_path1})
            or check_hooks(attn._modules)
        )
        rates = reason or attention_rates(block, training)
        if isinstance(rates, str):
            return rates
        dropout, drop_path = rates
        weights, biases = projections(attn)
        half = AttentionHalf(norm, weights, biases, attn.proj, attn.num_heads, block.gamma_1, dropout, drop_path)
        normalised = base_class(attn.q_norm) is not nn.Identity
        return RotaryHalf(half, attn.q_norm if normalised else None, attn.k_norm if normalised else None, None)

    @classmethod
    def mlp_half(cls, block: Any, training: bool | None = None) -> MlpHalf | GatedHalf | str:
        reason = (
            check_children("the block", block, BLOCK)
            or check_wish(block)
            or check_drop_path("drop_path2", block.drop_path2)
        )
        return reason or read_mlp(block, block.gamma_2, training)


class UnrotatedBlock(EvaBlock):
    """A block of a model without rotary position embedding: it is told of, and runs, as one without."""

    @classmethod
    def attention_half(cls, block: Any, training: bool | None = None) -> AttentionHalf | RotaryHalf | str:
        half = super().attention_half(block, training)
        return half if isinstance(half, str) else without_rotation(half)


def scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else gamma * branch


def without_rotation(half: AttentionHalf | RotaryHalf) -> AttentionHalf | RotaryHalf:
    return half.half if isinstance(half, RotaryHalf) and half.q_norm is None else half


def with_rotation(half: AttentionHalf | RotaryHalf, rope: Tensor, attn: Any) -> RotaryHalf | str:
    """`rope` holds the sines of each token and channel, and then the cosines: [N - prefix, 2 d]."""
    if rope.ndim != 2 or rope.shape[1] != 2 * attn.head_dim:
        return "a rotation of its own for each sample or head"
    sin, cos = rope.chunk(2, dim=-1)
    layout: Layout = "half" if getattr(attn, "rotate_half", False) else "interleaved"
    if isinstance(half, AttentionHalf):
        half = RotaryHalf(half, None, None, None)
    return half._replace(rotation=Rotation(sin, cos, attn.num_prefix_tokens, layout))


def projections(attn: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Weights and biases of queries, keys and values, packed in one or as three."""
    if attn.qkv is None:
        layers = [getattr(attn, name) for name in PROJECTIONS]
        return tuple(layer.weight for layer in layers), tuple(layer.bias for layer in layers)
    bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return (attn.qkv.weight,), (bias,)


def check_projections(attn: Any, width: int) -> str:
    if attn.num_heads * attn.head_dim != width or attn.scale != attn.head_dim**-0.5:
        return "heads of a width or scale of their own"
    if attn.qkv is not None:
        reason = check_linear("attn.qkv", attn.qkv, width, 3 * width)
        if not reason and attn.qkv.bias is not None:
            reason = "attn.qkv has a bias of its own"
    else:
        layers = {f"attn.{name}": getattr(attn, name) for name in PROJECTIONS}
        reason = next(filter(None, (check_linear(name, layer, width, width) for name, layer in layers.items())), "")
    if not reason and attn.q_bias is not None:
        reason = check_tensor("attn.q_bias", attn.q_bias) or check_tensor("attn.v_bias", attn.v_bias)
    return reason or check_linear("attn.proj", attn.proj, width, width)
