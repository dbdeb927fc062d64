"""A pre-norm block of another library, run as `attention_block` and `layer_norm_mlp` on the block's own parameters.

A library's file says where in its blocks the parameters are. It is asked at each call, not once: what has been changed
since (a rate, a hook, an exchanged layer) is seen, and a half that is no longer standard runs as its library wrote it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvit_kernels.attention_block import attention_block
from fastvit_kernels.gathered import GatheredWhole
from fastvit_kernels.integrations.checks import check_forward, fits
from fastvit_kernels.integrations.fused import Fused, Reading
from fastvit_kernels.mlp import Activation, layer_norm_mlp


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

    def __call__(self, x: Tensor) -> Tensor:
        # Three matrices are copied into one, 3 * D * D numbers at each call and their gradients back: less than
        # copying three outputs of B * N * D numbers as soon as there are more tokens than channels.
        biases = [_or_zeros(b, w) for b, w in zip(self.qkv_biases, self.qkv_weights, strict=True)]
        packed = len(self.qkv_weights) == 1
        return attention_block(
            x,
            self.norm.weight,
            self.norm.bias,
            self.qkv_weights[0] if packed else torch.cat(list(self.qkv_weights)),
            biases[0] if packed else torch.cat(biases),
            self.proj.weight,
            _or_zeros(self.proj.bias, self.proj.weight),
            heads=self.heads,
            eps=self.norm.eps,
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            drop_path=self.drop_path,
            causal=self.causal,
        )


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

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm_mlp(
            x,
            self.norm.weight,
            self.norm.bias,
            self.fc1.weight,
            _or_zeros(self.fc1.bias, self.fc1.weight),
            self.fc2.weight,
            _or_zeros(self.fc2.bias, self.fc2.weight),
            eps=self.norm.eps,
            activation=self.activation,
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            drop_path=self.drop_path,
        )


class FusedBlock(GatheredWhole, Fused):
    """What the blocks of all libraries share. `block` is one of the library's class, fused or not."""

    @classmethod
    def attention_half(cls, block: Any, training: bool | None = None) -> AttentionHalf | str:
        """The arguments in the block's present mode, or in the given one; or why the half is not standard."""
        raise NotImplementedError

    @classmethod
    def mlp_half(cls, block: Any, training: bool | None = None) -> MlpHalf | str:
        raise NotImplementedError

    @classmethod
    def reading(cls, module: nn.Module) -> Reading:
        if reason := check_forward("the block", module):
            return Reading((), (reason,))
        fused, left_alone = [], []
        for operation, half in (("attention_block", cls.attention_half), ("layer_norm_mlp", cls.mlp_half)):
            evaluation, training = half(module, training=False), half(module, training=True)
            if isinstance(evaluation, str):
                left_alone.append(f"no {operation}: {evaluation}")
                continue
            fused.append(operation)
            if isinstance(training, str):
                left_alone.append(f"no {operation} in training: {training}")
        return Reading(tuple(fused), tuple(left_alone))


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias
