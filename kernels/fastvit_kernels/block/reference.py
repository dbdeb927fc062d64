"""A pre-norm block as its two halves, each of which chooses its implementation."""

from torch import Tensor

from fastvit_kernels.attention_block import attention_block
from fastvit_kernels.mlp import Activation, layer_norm_mlp
from fastvit_kernels.mlp.op import Recompute


def transformer_block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    layer_scale1: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    layer_scale2: Tensor | None,
    heads: int,
    eps: float,
    activation: Activation,
    dropout: float,
    drop_path: float,
    recompute: Recompute,
) -> Tensor:
    x = attention_block(
        x,
        norm1_weight,
        norm1_bias,
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        heads=heads,
        eps=eps,
        layer_scale=layer_scale1,
        dropout=dropout,
        drop_path=drop_path,
        recompute="norm" if recompute == "all" else "none",
    )
    return layer_norm_mlp(
        x,
        norm2_weight,
        norm2_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        eps=eps,
        activation=activation,
        layer_scale=layer_scale2,
        dropout=dropout,
        drop_path=drop_path,
        recompute=recompute,
    )
