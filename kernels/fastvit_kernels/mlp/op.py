from typing import Literal, get_args

from torch import Tensor

from fastvit_kernels.checks import check_parameter, check_rate, check_tokens
from fastvit_kernels.dispatch import uses_triton
from fastvit_kernels.layer_norm import layer_norm
from fastvit_kernels.mlp import reference
from fastvit_kernels.residual import add_branch

Activation = Literal["gelu", "gelu_tanh"]


def layer_norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    eps: float,
    activation: Activation = "gelu",
    layer_scale: Tensor | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> Tensor:
    """The MLP half of a pre-norm block: x + drop_path(layer_scale * dropout(fc2(dropout(act(fc1(norm(x))))))).

    Args:
        x: [B, N, D], any floating dtype.
        norm_weight, norm_bias: [D], the dtype of x or float32.
        fc1_weight, fc1_bias: [M, D] and [M], for any hidden width M.
        fc2_weight, fc2_bias: [D, M] and [D].
        activation: "gelu" is the exact erf form, "gelu_tanh" the tanh form (Hendrycks and Gimpel 2016).
        layer_scale: [D], the dtype of x or float32; None leaves it out.
        dropout: rate on the activations and, drawn apart, on the output (Dosovitskiy et al. 2021, appendix B.1).
        drop_path: rate at which a sample's whole branch is dropped; kept branches are scaled by 1 / (1 - drop_path).

    Rates are active whenever above 0. Returns [B, N, D]. Raises ValueError for a wrong shape, device, rate or
    activation and TypeError for a wrong dtype.
    """
    check_tokens("x", x)
    width, hidden = x.shape[-1], fc1_weight.shape[0]
    check_parameter("norm_weight", norm_weight, [width], like=x, fp32_allowed=True)
    check_parameter("norm_bias", norm_bias, [width], like=x, fp32_allowed=True)
    check_parameter("fc1_weight", fc1_weight, [hidden, width], like=x)
    check_parameter("fc1_bias", fc1_bias, [hidden], like=x)
    check_parameter("fc2_weight", fc2_weight, [width, hidden], like=x)
    check_parameter("fc2_bias", fc2_bias, [width], like=x)
    if layer_scale is not None:
        check_parameter("layer_scale", layer_scale, [width], like=x, fp32_allowed=True)
    if activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
    check_rate("dropout", dropout)
    check_rate("drop_path", drop_path)
    if uses_triton(x):
        normed = layer_norm(x, norm_weight, norm_bias, eps=eps)  # [B, N, D]
        branch = reference.mlp(normed, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, dropout)
        return add_branch(x, branch, layer_scale=layer_scale, dropout=dropout, drop_path=drop_path)
    return reference.layer_norm_mlp(
        x,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        eps,
        activation,
        layer_scale,
        dropout,
        drop_path,
    )
