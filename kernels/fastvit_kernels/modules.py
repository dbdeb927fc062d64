"""Modules over the functions of this package. Each owns its parameters, under the names of timm's Vision Transformer.

Dropout and stochastic depth are active in training mode only.

A module that reads the parameters of its children, without calling them, says `_z3_leaf = True`: DeepSpeed ZeRO-3
gathers the sharded parameters of the module that is called, and those of its children too only with this mark.
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from fastvit_kernels.attention import attention
from fastvit_kernels.attention_block import attention_block
from fastvit_kernels.cross_entropy import cross_entropy, sigmoid_cross_entropy
from fastvit_kernels.layer_norm import layer_norm
from fastvit_kernels.mlp import Activation, layer_norm_mlp
from fastvit_kernels.patch_embed import patch_embed


class FusedLayerNorm(nn.Module):
    """Layer normalisation over the last dimension: [..., D] -> [..., D]. Parameters: weight, bias [D]."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


class FusedPatchEmbed(nn.Module):
    """Images to tokens, see `patch_embed`. Parameters: proj.weight [D, 3, P, P], proj.bias [D].

    Position embedding and class token belong to the model and are passed to `forward`.
    """

    _z3_leaf = True  # forward reads proj.weight and proj.bias

    def __init__(self, patch_size: int, width: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor, pos_embed: Tensor | None = None, cls_token: Tensor | None = None) -> Tensor:
        bias = cast(Tensor, self.proj.bias)  # a Conv2d may have none, this one has
        return patch_embed(
            images,
            self.proj.weight,
            bias,
            pos_embed=pos_embed,
            cls_token=cls_token,
            mean=self.mean,
            std=self.std,
        )


class FusedAttention(nn.Module):
    """Multi-head self-attention with its projections: [B, N, D] -> [B, N, D]. Parameters: qkv.*, proj.*.

    `dropout` acts on the projected output; attention probabilities are not dropped.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide the width {width}, got {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, N, 3, H, d]
        return self.dropout(self.proj(attention(qkv)))


class LayerScale(nn.Module):
    """Holds gamma [D], the learned scale of a residual branch (Touvron et al. 2021)."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))


class Mlp(nn.Module):
    """Holds fc1 [M, D] and fc2 [D, M]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)


class FusedLayerNormMLP(nn.Module):
    """The MLP half of a pre-norm block, residual included, see `layer_norm_mlp`: [B, N, D] -> [B, N, D].

    Parameters: norm.*, fc1.*, fc2.*, and ls.gamma unless `layer_scale` (its initial value) is None.
    """

    _z3_leaf = True  # forward reads the parameters of every child

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.dropout, self.drop_path, self.eps = dropout, drop_path, eps
        self.norm = FusedLayerNorm(width, eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.ls = None if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm_mlp(
            x,
            self.norm.weight,
            self.norm.bias,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            eps=self.eps,
            activation=self.activation,
            layer_scale=None if self.ls is None else self.ls.gamma,
            dropout=self.dropout if self.training else 0.0,
            drop_path=self.drop_path if self.training else 0.0,
        )


class FusedBlock(nn.Module):
    """A pre-norm Transformer block: `attention_block`, then `layer_norm_mlp`: [B, N, D] -> [B, N, D].

    Parameters: norm1.*, attn.qkv.*, attn.proj.*, norm2.*, mlp.fc1.*, mlp.fc2.*, and ls1.gamma, ls2.gamma unless
    `layer_scale` (their initial value) is None. The children hold parameters; `forward` does not call them.
    """

    _z3_leaf = True  # forward reads the parameters of every child

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_dim: int,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.activation: Activation = activation
        self.dropout, self.drop_path = dropout, drop_path
        self.norm1 = FusedLayerNorm(width, eps)
        self.attn = FusedAttention(width, heads)
        self.ls1 = None if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = FusedLayerNorm(width, eps)
        self.mlp = Mlp(width, mlp_dim)
        self.ls2 = None if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        drop_path = self.drop_path if self.training else 0.0
        x = attention_block(
            x,
            self.norm1.weight,
            self.norm1.bias,
            self.attn.qkv.weight,
            self.attn.qkv.bias,
            self.attn.proj.weight,
            self.attn.proj.bias,
            heads=self.heads,
            eps=self.eps,
            layer_scale=None if self.ls1 is None else self.ls1.gamma,
            dropout=dropout,
            drop_path=drop_path,
        )
        return layer_norm_mlp(
            x,
            self.norm2.weight,
            self.norm2.bias,
            self.mlp.fc1.weight,
            self.mlp.fc1.bias,
            self.mlp.fc2.weight,
            self.mlp.fc2.bias,
            eps=self.eps,
            activation=self.activation,
            layer_scale=None if self.ls2 is None else self.ls2.gamma,
            dropout=dropout,
            drop_path=drop_path,
        )


class FusedCrossEntropy(nn.Module):
    """`cross_entropy` or, for kind "sigmoid", `sigmoid_cross_entropy`."""

    def __init__(self, kind: Literal["softmax", "sigmoid"] = "softmax", label_smoothing: float = 0.0) -> None:
        super().__init__()
        if kind not in ("softmax", "sigmoid"):
            raise ValueError(f"kind must be 'softmax' or 'sigmoid', got {kind!r}")
        self.kind, self.label_smoothing = kind, label_smoothing

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        labels_b: Tensor | None = None,
        mix_weight: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        loss = cross_entropy if self.kind == "softmax" else sigmoid_cross_entropy
        return loss(
            logits,
            labels,
            labels_b=labels_b,
            mix_weight=mix_weight,
            label_smoothing=self.label_smoothing,
            reduction=reduction,
        )
