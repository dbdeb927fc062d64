"""Modules over the functions of this package. Each owns its parameters, under the names of timm's Vision Transformer.

Dropout and stochastic depth are active in training mode only. `drop_path_mode` says what becomes of the samples whose
branch is dropped: "mask" computes and discards it, each sample drawn for itself; "subset" computes the others only and
draws a fixed share of the batch, see `drop_path_subset`.

A module that reads the parameters of its children, without calling them, is `GatheredWhole`: DeepSpeed ZeRO-3 gathers
the sharded parameters of the module that is called, and those of its children too only then.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from fastvit_kernels.attention import attention, relative_bias
from fastvit_kernels.attention_block import attention_block
from fastvit_kernels.block import transformer_block
from fastvit_kernels.cross_entropy import cross_entropy, sigmoid_cross_entropy
from fastvit_kernels.dispatch import shown
from fastvit_kernels.fp8.setting import LAYERS, Fp8, Scaling, fits
from fastvit_kernels.gathered import GatheredWhole
from fastvit_kernels.layer_norm import layer_norm
from fastvit_kernels.mlp import Activation, layer_norm_mlp
from fastvit_kernels.mlp.op import Recompute
from fastvit_kernels.patch_embed import patch_embed
from fastvit_kernels.residual import drop_path_subset
from fastvit_kernels.swiglu import layer_norm_swiglu, swiglu_mlp
from fastvit_kernels.swiglu.op import Recompute as GateRecompute

DropPathMode = Literal["mask", "subset"]


class FusedLayerNorm(nn.Module):
    """Layer normalisation over the last dimension: [..., D] -> [..., D]. Parameters: weight, bias [D]."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def extra_repr(self) -> str:
        return shown(self.weight, "layer_norm")

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


class PatchProjection(nn.Conv2d):
    """The convolution of `FusedPatchEmbed`, which calls it, as ZeRO-3 gathers the parameters of what is called."""

    def forward(  # type: ignore[override]
        self,
        images: Tensor,
        pos_embed: Tensor | None,
        cls_token: Tensor | None,
        register_tokens: Tensor | None,
        keep_indices: Tensor | None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> Tensor:
        return patch_embed(
            images,
            self.weight,
            cast(Tensor, self.bias),  # a Conv2d may have none, this one has
            pos_embed=pos_embed,
            cls_token=cls_token,
            register_tokens=register_tokens,
            keep_indices=keep_indices,
            mean=mean,
            std=std,
        )


class FusedPatchEmbed(nn.Module):
    """Images to tokens, see `patch_embed`. Parameters: proj.weight [D, 3, P, P], proj.bias [D].

    Position embedding, class token and registers belong to the model and are passed to `forward`, as are the indices of
    the patches to embed where not all are.
    """

    def __init__(self, patch_size: int, width: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)
        self.proj = PatchProjection(3, width, kernel_size=patch_size, stride=patch_size)

    def extra_repr(self) -> str:
        return shown(self.proj.weight, "patch_embed")

    def forward(
        self,
        images: Tensor,
        pos_embed: Tensor | None = None,
        cls_token: Tensor | None = None,
        register_tokens: Tensor | None = None,
        keep_indices: Tensor | None = None,
    ) -> Tensor:
        return self.proj(images, pos_embed, cls_token, register_tokens, keep_indices, self.mean, self.std)


class FusedAttention(nn.Module):
    """Multi-head self-attention with its projections: [B, N, D] -> [B, N, D]. Parameters: qkv.*, proj.*.

    `dropout` acts on the projected output, `attention_dropout` on the attention probabilities. With `relative_tokens`,
    the number N of tokens, also rel_pos_embed [2N - 1, D / heads], zeros at first: relative positions, see
    `relative_bias`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        relative_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide the width {width}, got {heads}")
        self.heads, self.attention_dropout = heads, attention_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.rel_pos_embed: nn.Parameter | None = None
        if relative_tokens is not None:
            self.rel_pos_embed = nn.Parameter(torch.zeros(2 * relative_tokens - 1, width // heads))

    def extra_repr(self) -> str:
        return shown(self.qkv.weight, "attention")

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, N, 3, H, d]
        bias = None if self.rel_pos_embed is None else relative_bias(qkv.select(-3, 0), self.rel_pos_embed)
        attended = attention(qkv, bias=bias, dropout=self.attention_dropout if self.training else 0.0)  # [B, N, D]
        return self.dropout(self.proj(attended))


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


class FusedLayerNormMLP(GatheredWhole):
    """The MLP half of a pre-norm block, residual included, see `layer_norm_mlp`: [B, N, D] -> [B, N, D].

    Parameters: norm.*, fc1.*, fc2.*, and ls.gamma unless `layer_scale` (its initial value) is None.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        eps: float = 1e-6,
        drop_path_mode: DropPathMode = "mask",
        recompute: Recompute = "gelu",
    ) -> None:
        super().__init__()
        check_choice("drop_path_mode", drop_path_mode, get_args(DropPathMode))
        check_choice("recompute", recompute, get_args(Recompute))
        self.activation: Activation = activation
        self.dropout, self.drop_path, self.eps = dropout, drop_path, eps
        self.drop_path_mode: DropPathMode = drop_path_mode
        self.recompute: Recompute = recompute
        self.norm = FusedLayerNorm(width, eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.ls = None if layer_scale is None else LayerScale(width, layer_scale)

    def extra_repr(self) -> str:
        return shown(self.fc1.weight, "mlp")

    def forward(self, x: Tensor) -> Tensor:
        half_block = partial(
            layer_norm_mlp,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            fc1_weight=self.fc1.weight,
            fc1_bias=self.fc1.bias,
            fc2_weight=self.fc2.weight,
            fc2_bias=self.fc2.bias,
            eps=self.eps,
            activation=self.activation,
            dropout=self.dropout if self.training else 0.0,
            recompute=self.recompute,
        )
        return with_drop_path(half_block, x, self.ls, self.drop_path if self.training else 0.0, self.drop_path_mode)


class FusedSwiGLU(GatheredWhole):
    """A gated MLP, see `swiglu_mlp`: [..., D] -> [..., D]. Parameters: fc1.* [2M, D], the gate first, and fc2.*."""

    def __init__(self, width: int, hidden: int, recompute: GateRecompute = "gate") -> None:
        super().__init__()
        check_choice("recompute", recompute, get_args(GateRecompute))
        self.recompute: GateRecompute = recompute
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def extra_repr(self) -> str:
        return shown(self.fc1.weight, "swiglu")

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        return swiglu_mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, recompute=self.recompute)


class FusedLayerNormSwiGLU(GatheredWhole):
    """The MLP half of a pre-norm block with a gated MLP, see `layer_norm_swiglu`: [B, N, D] -> [B, N, D].

    Parameters: norm.*, fc1.* [2M, D], the gate first, fc2.*, and ls.gamma unless `layer_scale` (its initial value) is
    None.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        eps: float = 1e-6,
        drop_path_mode: DropPathMode = "mask",
        recompute: GateRecompute = "gate",
    ) -> None:
        super().__init__()
        check_choice("drop_path_mode", drop_path_mode, get_args(DropPathMode))
        check_choice("recompute", recompute, get_args(GateRecompute))
        self.drop_path, self.eps = drop_path, eps
        self.drop_path_mode: DropPathMode = drop_path_mode
        self.recompute: GateRecompute = recompute
        self.norm = FusedLayerNorm(width, eps)
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.ls = None if layer_scale is None else LayerScale(width, layer_scale)

    def extra_repr(self) -> str:
        return shown(self.fc1.weight, "swiglu")

    def forward(self, x: Tensor) -> Tensor:
        half_block = partial(
            layer_norm_swiglu,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            fc1_weight=self.fc1.weight,
            fc1_bias=self.fc1.bias,
            fc2_weight=self.fc2.weight,
            fc2_bias=self.fc2.bias,
            eps=self.eps,
            recompute=self.recompute,
        )
        return with_drop_path(half_block, x, self.ls, self.drop_path if self.training else 0.0, self.drop_path_mode)


class FusedBlock(GatheredWhole):
    """A pre-norm Transformer block, see `transformer_block`: [B, N, D] -> [B, N, D].

    Parameters: norm1.*, attn.qkv.*, attn.proj.*, norm2.*, mlp.fc1.*, mlp.fc2.*; ls1.gamma and ls2.gamma unless
    `layer_scale` (their initial value) is None; attn.rel_pos_embed if there are `relative_tokens`, as in
    `FusedAttention`. The children hold parameters; `forward` does not call them. `recompute` says what the backward
    pass computes again instead of keeping it: nothing ("none"), the GELU ("gelu"), or both normalisations too ("all");
    matrix products and attention never.
    """

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
        drop_path_mode: DropPathMode = "mask",
        recompute: Recompute = "gelu",
        relative_tokens: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("drop_path_mode", drop_path_mode, get_args(DropPathMode))
        check_choice("recompute", recompute, get_args(Recompute))
        self.heads, self.eps = heads, eps
        self.activation: Activation = activation
        self.dropout, self.drop_path = dropout, drop_path
        self.drop_path_mode: DropPathMode = drop_path_mode
        self.recompute: Recompute = recompute
        self.fp8: Fp8 | None = None  # in training; evaluation is in the dtype of the weights
        self.norm1 = FusedLayerNorm(width, eps)
        self.attn = FusedAttention(width, heads, relative_tokens=relative_tokens)
        self.ls1 = None if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = FusedLayerNorm(width, eps)
        self.mlp = Mlp(width, mlp_dim)
        self.ls2 = None if layer_scale is None else LayerScale(width, layer_scale)

    def compute_in_fp8(self, scaling: Scaling, layers: Iterable[str] = LAYERS) -> tuple[str, ...]:
        """From now on these layers compute their products in FP8 in training, if they fit; returns those that do not.

        What does not fit has a weight with a size that is not a multiple of 16, and computes as before.
        """
        weights = {
            "qkv": self.attn.qkv.weight,
            "proj": self.attn.proj.weight,
            "fc1": self.mlp.fc1.weight,
            "fc2": self.mlp.fc2.weight,
        }
        asked = Fp8(scaling, layers)
        fitting = [name for name in LAYERS if name in asked.layers and fits(weights[name].shape)]
        self.fp8 = Fp8(scaling, fitting) if fitting else None
        return tuple(name for name in LAYERS if name in asked.layers and name not in fitting)

    def extra_repr(self) -> str:
        relative = self.attn.rel_pos_embed is not None  # the attention half is a composition then
        fp8 = "" if self.fp8 is None else f"fp8={self.fp8}, "
        return fp8 + shown(self.mlp.fc1.weight, *(("attention",) if relative else ("block", "attention_block")), "mlp")

    def forward(
        self,
        x: Tensor,
        outputs: int | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """With `outputs`, the first tokens of the result alone: [B, outputs, D].

        Keys and values are still those of all tokens; what else there is to compute, and to keep, is not. cu_seqlens,
        max_seqlen: x is [1, T, D], the tokens of sequences of different lengths, see `attention_block`.
        """
        dropout = self.dropout if self.training else 0.0
        drop_path = self.drop_path if self.training else 0.0
        if drop_path > 0 and self.drop_path_mode == "subset" and cu_seqlens is None:
            return self.forward_of_subsets(x, outputs, dropout, drop_path)
        attn, mlp = self.attn, self.mlp
        norm1, qkv, proj, norm2, fc1, fc2 = self.norm1, attn.qkv, attn.proj, self.norm2, mlp.fc1, mlp.fc2
        return transformer_block(
            x,
            norm1.weight,
            norm1.bias,
            qkv.weight,
            qkv.bias,
            proj.weight,
            proj.bias,
            norm2.weight,
            norm2.bias,
            fc1.weight,
            fc1.bias,
            fc2.weight,
            fc2.bias,
            heads=self.heads,
            eps=self.eps,
            activation=self.activation,
            layer_scale1=None if self.ls1 is None else self.ls1.gamma,
            layer_scale2=None if self.ls2 is None else self.ls2.gamma,
            dropout=dropout,
            drop_path=drop_path,
            recompute=self.recompute,
            outputs=outputs,
            rel_pos_embed=attn.rel_pos_embed,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            fp8=self.fp8 if self.training else None,
        )

    def forward_of_subsets(self, x: Tensor, outputs: int | None, dropout: float, drop_path: float) -> Tensor:
        """Each half on samples of its own, see `drop_path_subset`."""
        attention_half = partial(
            attention_block,
            norm_weight=self.norm1.weight,
            norm_bias=self.norm1.bias,
            qkv_weight=self.attn.qkv.weight,
            qkv_bias=self.attn.qkv.bias,
            proj_weight=self.attn.proj.weight,
            proj_bias=self.attn.proj.bias,
            heads=self.heads,
            eps=self.eps,
            dropout=dropout,
            recompute="norm" if self.recompute == "all" else "none",
            outputs=outputs,
            rel_pos_embed=self.attn.rel_pos_embed,
            fp8=self.fp8 if self.training else None,
        )
        mlp_half = partial(
            layer_norm_mlp,
            norm_weight=self.norm2.weight,
            norm_bias=self.norm2.bias,
            fc1_weight=self.mlp.fc1.weight,
            fc1_bias=self.mlp.fc1.bias,
            fc2_weight=self.mlp.fc2.weight,
            fc2_bias=self.mlp.fc2.bias,
            eps=self.eps,
            activation=self.activation,
            dropout=dropout,
            recompute=self.recompute,
            fp8=self.fp8 if self.training else None,
        )
        x = with_drop_path(attention_half, x, self.ls1, drop_path, "subset", outputs)
        return with_drop_path(mlp_half, x, self.ls2, drop_path, "subset")


class FusedCrossEntropy(nn.Module):
    """`cross_entropy` or, for kind "sigmoid", `sigmoid_cross_entropy`, which has no `z_loss`."""

    def __init__(
        self, kind: Literal["softmax", "sigmoid"] = "softmax", label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> None:
        super().__init__()
        check_choice("kind", kind, ("softmax", "sigmoid"))
        if kind == "sigmoid" and z_loss != 0:
            raise ValueError(f"z_loss belongs to the softmax; with kind 'sigmoid' it must be 0, got {z_loss}")
        self.kind, self.label_smoothing, self.z_loss = kind, label_smoothing, z_loss

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        labels_b: Tensor | None = None,
        mix_weight: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        loss = partial(cross_entropy, z_loss=self.z_loss) if self.kind == "softmax" else sigmoid_cross_entropy
        return loss(
            logits,
            labels,
            labels_b=labels_b,
            mix_weight=mix_weight,
            label_smoothing=self.label_smoothing,
            reduction=reduction,
        )


def with_drop_path(
    half_block: Callable[..., Tensor],
    x: Tensor,
    scale: LayerScale | None,
    drop_path: float,
    mode: DropPathMode,
    outputs: int | None = None,
) -> Tensor:
    layer_scale = None if scale is None else scale.gamma
    if mode == "subset":
        return drop_path_subset(half_block, x, layer_scale=layer_scale, drop_path=drop_path, outputs=outputs)
    return half_block(x, layer_scale=layer_scale, drop_path=drop_path)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
