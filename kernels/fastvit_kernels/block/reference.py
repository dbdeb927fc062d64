"""A pre-norm block as its two halves, each of which chooses its implementation."""

from typing import Any

from torch import Tensor

from fastvit_kernels.attention_block import attention_block
from fastvit_kernels.fp8.setting import Fp8
from fastvit_kernels.mlp import Activation, layer_norm_mlp
from fastvit_kernels.mlp.op import Recompute


def transformer_block(
    x: Tensor,
    *parameters: Any,
    heads: int,
    eps: float,
    activation: Activation,
    dropout: float,
    drop_path: float,
    causal: bool,
    recompute: Recompute,
    outputs: int | None,
    rel_pos_embed: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    fp8: Fp8 | None = None,
) -> Tensor:
    """Each half has seven parameters: of its normalisation and its two layers, weight then bias, and a LayerScale."""
    *first, layer_scale = parameters[:7]
    x = attention_block(
        x,
        *first,
        heads=heads,
        eps=eps,
        layer_scale=layer_scale,
        dropout=dropout,
        drop_path=drop_path,
        causal=causal,
        recompute="norm" if recompute == "all" else "none",
        outputs=outputs,
        rel_pos_embed=rel_pos_embed,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        fp8=fp8,
    )
    *second, layer_scale = parameters[7:]
    return layer_norm_mlp(
        x,
        *second,
        eps=eps,
        activation=activation,
        layer_scale=layer_scale,
        dropout=dropout,
        drop_path=drop_path,
        recompute=recompute,
        fp8=fp8,
    )
