"""A pre-norm block of another library, run as `transformer_block` on the block's own parameters.

A library's file says where in its blocks the parameters are. It is asked at each call, not once: what has been changed
since (a rate, a hook, an exchanged layer) is seen, and a half that is no longer standard runs as its library wrote it.
The other half runs fused then, as `attention_block` or `layer_norm_mlp`, and so do both where they cannot be one.
A gated MLP is `layer_norm_swiglu`. Attention that normalises or rotates queries and keys runs as single operations.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_kernels.attention import attention
from fastvit_kernels.attention_block import attention_block
from fastvit_kernels.block import transformer_block
from fastvit_kernels.gathered import GatheredWhole
from fastvit_kernels.integrations.checks import check_forward, fits
from fastvit_kernels.integrations.fused import Fused, Reading
from fastvit_kernels.layer_norm import layer_norm
from fastvit_kernels.mlp import Activation, layer_norm_mlp
from fastvit_kernels.residual import add_branch
from fastvit_kernels.rotary import rotary_qk_norm
from fastvit_kernels.rotary.op import Layout
from fastvit_kernels.swiglu import layer_norm_swiglu


class AttentionHalf(NamedTuple):
    """Arguments of `attention_block`; weights and biases of queries, keys, values come packed in one, or as three."""

    norm: Any
    qkv_weights: Sequence[Tensor]
    qkv_biases: Sequence[Tensor | None]
    proj: Any
    heads: int
    layer_scale: Tensor | None
    dropout: float
    drop_path: float
    causal: bool = False

    def accepts(self, x: Any) -> bool:
        return fits(x, self.proj.weight) and x.ndim == 3

    def parameters(self) -> tuple[Tensor, ...]:
        """Weight and bias of the norm, of the packed queries, keys and values, and of the projection."""
        # Three matrices are copied into one, 3 * D * D numbers at each call and their gradients back: less than
        # copying three outputs of B * N * D numbers as soon as there are more tokens than channels.
        weights = self.qkv_weights
        biases = [_or_zeros(bias, weight) for bias, weight in zip(self.qkv_biases, weights, strict=True)]
        packed = len(weights) == 1
        return (
            self.norm.weight,
            self.norm.bias,
            weights[0] if packed else torch.cat(list(weights)),
            biases[0] if packed else torch.cat(biases),
            self.proj.weight,
            _or_zeros(self.proj.bias, self.proj.weight),
        )

    def __call__(self, x: Tensor) -> Tensor:
        return attention_block(
            x,
            *self.parameters(),
            heads=self.heads,
            eps=self.norm.eps,
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            drop_path=self.drop_path,
            causal=self.causal,
        )


class Rotation(NamedTuple):
    """Arguments of `rotary_qk_norm`."""

    sin: Tensor  # [N - prefix, d]
    cos: Tensor
    prefix: int
    layout: Layout


class RotaryHalf(NamedTuple):
    """An attention half whose queries and keys are normalised head by head, rotated, or both."""

    half: AttentionHalf
    q_norm: Any | None  # the LayerNorms of queries and keys: both or neither, with the same eps
    k_norm: Any | None
    rotation: Rotation | None

    def accepts(self, x: Any) -> bool:
        if not self.half.accepts(x):
            return False
        if self.rotation is None:
            return True
        (sin, cos, prefix, _), head_dim = self.rotation, x.shape[-1] // self.half.heads
        return all(
            angles.shape == (x.shape[1] - prefix, head_dim) and angles.device == x.device and not angles.requires_grad
            for angles in (sin, cos)
        )

    def __call__(self, x: Tensor) -> Tensor:
        half = self.half
        norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias = half.parameters()
        normed = layer_norm(x, norm_weight, norm_bias, eps=half.norm.eps)
        qkv = F.linear(normed, qkv_weight, qkv_bias).unflatten(-1, (3, half.heads, -1))  # [B, N, 3, H, d]
        norms: dict[str, Any] = {}
        if self.q_norm is not None and self.k_norm is not None:
            for name, norm in (("q", self.q_norm), ("k", self.k_norm)):
                norms |= {f"{name}_norm_weight": norm.weight, f"{name}_norm_bias": norm.bias, "eps": norm.eps}
        if self.rotation is None:
            qkv = rotary_qk_norm(qkv, **norms)
        else:
            sin, cos, prefix, layout = self.rotation
            qkv = rotary_qk_norm(qkv, sin, cos, prefix=prefix, layout=layout, **norms)
        branch = F.linear(attention(qkv), proj_weight, proj_bias)
        return add_branch(x, branch, layer_scale=half.layer_scale, dropout=half.dropout, drop_path=half.drop_path)


class MlpHalf(NamedTuple):
    """Arguments of `layer_norm_mlp`."""

    norm: Any
    fc1: Any
    fc2: Any
    activation: Activation
    layer_scale: Tensor | None
    dropout: float
    drop_path: float

    def accepts(self, x: Any) -> bool:
        return fits(x, self.fc1.weight) and x.ndim == 3

    def parameters(self) -> tuple[Tensor, ...]:
        """Weight and bias of the norm and of both layers."""
        fc1, fc2 = self.fc1, self.fc2
        biases = _or_zeros(fc1.bias, fc1.weight), _or_zeros(fc2.bias, fc2.weight)
        return self.norm.weight, self.norm.bias, fc1.weight, biases[0], fc2.weight, biases[1]

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm_mlp(
            x,
            *self.parameters(),
            eps=self.norm.eps,
            activation=self.activation,
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            drop_path=self.drop_path,
        )


class GatedHalf(NamedTuple):
    """Arguments of `layer_norm_swiglu`; fc1 is one layer, of the gate and then the value, or a layer for each."""

    norm: Any
    fc1: Sequence[Any]
    fc2: Any
    layer_scale: Tensor | None
    drop_path: float

    def accepts(self, x: Any) -> bool:
        return fits(x, self.fc2.weight) and x.ndim == 3

    def __call__(self, x: Tensor) -> Tensor:
        weights = [layer.weight for layer in self.fc1]
        biases = [_or_zeros(layer.bias, layer.weight) for layer in self.fc1]
        packed = len(weights) == 1
        return layer_norm_swiglu(
            x,
            self.norm.weight,
            self.norm.bias,
            weights[0] if packed else weights,
            biases[0] if packed else biases,
            self.fc2.weight,
            self.fc2.bias,
            eps=self.norm.eps,
            layer_scale=self.layer_scale,
            drop_path=self.drop_path,
        )


def are_one(attention: AttentionHalf, mlp: MlpHalf) -> bool:
    """Whether the halves are one `transformer_block`, which has one eps and one drop path.

    With dropout it would run the two halves itself.
    """
    return (
        attention.norm.eps == mlp.norm.eps
        and attention.drop_path == mlp.drop_path
        and attention.dropout == mlp.dropout == 0
    )


def whole_block(x: Tensor, attention: AttentionHalf, mlp: MlpHalf) -> Tensor:
    return transformer_block(
        x,
        *attention.parameters(),
        *mlp.parameters(),
        heads=attention.heads,
        eps=attention.norm.eps,
        activation=mlp.activation,
        layer_scale1=attention.layer_scale,
        layer_scale2=mlp.layer_scale,
        drop_path=attention.drop_path,
        causal=attention.causal,
    )


ROTARY = ["layer_norm", "rotary", "attention"]  # what a RotaryHalf runs as


class FusedBlock(GatheredWhole, Fused):
    """What the blocks of all libraries share. `block` is one of the library's class, fused or not."""

    @classmethod
    def attention_half(cls, block: Any, training: bool | None = None) -> AttentionHalf | RotaryHalf | str:
        """The arguments in the block's present mode, or in the given one; or why the half is not standard."""
        raise NotImplementedError

    @classmethod
    def mlp_half(cls, block: Any, training: bool | None = None) -> MlpHalf | GatedHalf | str:
        raise NotImplementedError

    @staticmethod
    def run(
        x: Any,
        attention: AttentionHalf | RotaryHalf | str,
        mlp: MlpHalf | GatedHalf | str,
        attention_branch: Callable[[Any], Tensor],
        mlp_branch: Callable[[Any], Tensor],
    ) -> Tensor:
        """Both halves; the branches are what the library adds to x, for a half that cannot run fused."""
        if isinstance(attention, str) or not attention.accepts(x):
            x = x + attention_branch(x)
        elif (
            isinstance(attention, AttentionHalf)
            and isinstance(mlp, MlpHalf)
            and mlp.accepts(x)
            and are_one(attention, mlp)
        ):
            return whole_block(x, attention, mlp)
        else:
            x = attention(x)
        if isinstance(mlp, str) or not mlp.accepts(x):
            return x + mlp_branch(x)
        return mlp(x)

    @classmethod
    def reading(cls, module: nn.Module) -> Reading:
        """In the module's present mode both halves may be one operation; what training excludes is always told."""
        if reason := check_forward("the block", module):
            return Reading((), (reason,))
        fused, left_alone = [], []
        for operation, half in (("attention_block", cls.attention_half), ("layer_norm_mlp", cls.mlp_half)):
            evaluation, training = half(module, training=False), half(module, training=True)
            if isinstance(evaluation, str):
                left_alone.append(f"no {operation}: {evaluation}")
                continue
            if isinstance(evaluation, GatedHalf):
                operation = "layer_norm_swiglu"
            fused += ROTARY if isinstance(evaluation, RotaryHalf) else [operation]
            if isinstance(training, str):
                left_alone.append(f"no {operation} in training: {training}")
        attention, mlp = cls.attention_half(module), cls.mlp_half(module)
        if isinstance(attention, AttentionHalf) and isinstance(mlp, MlpHalf) and are_one(attention, mlp):
            fused = ["block"]
        return Reading(tuple(fused), tuple(left_alone))


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias
