import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.attention import reference
from fastvit_kernels.checks import check_floating, check_parameter, check_rate, check_tokens
from fastvit_kernels.dispatch import uses_triton
from fastvit_kernels.layer_norm import layer_norm
from fastvit_kernels.residual import add_branch


def attention(qkv: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Multi-head self-attention softmax(q k^T / sqrt(d)) v of packed queries, keys and values (Vaswani et al. 2017).

    Args:
        qkv: [B, N, 3, H, d], any floating dtype: what one linear layer of width 3*H*d gives, unflattened.
        dropout: rate at which attention probabilities are dropped; active whenever above 0.

    Returns [B, N, H*d] in the dtype of qkv. Raises ValueError for a wrong shape or rate, TypeError for a wrong dtype.
    """
    check_floating("qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must have shape [B, N, 3, H, d], got {list(qkv.shape)}")
    check_rate("dropout", dropout)
    return reference.attention(qkv, dropout)


def attention_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    *,
    heads: int,
    eps: float,
    layer_scale: Tensor | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> Tensor:
    """The attention half of a pre-norm block: x + drop_path(layer_scale * dropout(proj(attention(qkv(norm(x)))))).

    Args:
        x: [B, N, D], any floating dtype; D must be divisible by `heads`.
        norm_weight, norm_bias: [D], the dtype of x or float32.
        qkv_weight, qkv_bias: [3*D, D] and [3*D]; rows are the queries, then keys, then values, each head after head.
        proj_weight, proj_bias: [D, D] and [D].
        layer_scale: [D], the dtype of x or float32; None leaves it out.
        dropout: rate on the projected output. Attention probabilities are not dropped, as in Dosovitskiy et al. 2021.
        drop_path: rate at which a sample's whole branch is dropped; kept branches are scaled by 1 / (1 - drop_path).

    Rates are active whenever above 0. Returns [B, N, D]. Raises ValueError for a wrong shape, device or rate and
    TypeError for a wrong dtype.
    """
    check_tokens("x", x)
    width = x.shape[-1]
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide the width {width} of x, got {heads}")
    check_parameter("norm_weight", norm_weight, [width], like=x, fp32_allowed=True)
    check_parameter("norm_bias", norm_bias, [width], like=x, fp32_allowed=True)
    check_parameter("qkv_weight", qkv_weight, [3 * width, width], like=x)
    check_parameter("qkv_bias", qkv_bias, [3 * width], like=x)
    check_parameter("proj_weight", proj_weight, [width, width], like=x)
    check_parameter("proj_bias", proj_bias, [width], like=x)
    if layer_scale is not None:
        check_parameter("layer_scale", layer_scale, [width], like=x, fp32_allowed=True)
    check_rate("dropout", dropout)
    check_rate("drop_path", drop_path)
    if uses_triton(x):
        qkv = F.linear(layer_norm(x, norm_weight, norm_bias, eps=eps), qkv_weight, qkv_bias)  # [B, N, 3*D]
        mixed = attention(qkv.unflatten(-1, (3, heads, -1)))  # [B, N, D]
        branch = F.linear(mixed, proj_weight, proj_bias)  # [B, N, D]
        return add_branch(x, branch, layer_scale=layer_scale, dropout=dropout, drop_path=drop_path)
    return reference.attention_block(
        x,
        norm_weight,
        norm_bias,
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        heads,
        eps,
        layer_scale,
        dropout,
        drop_path,
    )
