from torch import Tensor

from fastvit_kernels.attention_block import reference
from fastvit_kernels.checks import check_parameter, check_rate, check_tokens


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
