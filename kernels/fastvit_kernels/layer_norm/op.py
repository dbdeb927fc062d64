from torch import Tensor

from fastvit_kernels.checks import check_floating, check_parameter
from fastvit_kernels.layer_norm import reference


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Layer normalisation over the last dimension (Ba et al. 2016), statistics in float32.

    Args:
        x: [..., D], any floating dtype.
        weight, bias: [D], the dtype of x or float32.
        eps: added to the variance; 1e-6 in Vision Transformers.

    Returns [..., D] in the dtype of x. Raises ValueError for a wrong shape or device, TypeError for a wrong dtype.
    """
    check_floating("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension to normalise, got shape {list(x.shape)}")
    check_parameter("weight", weight, x.shape[-1:], like=x, fp32_allowed=True)
    check_parameter("bias", bias, x.shape[-1:], like=x, fp32_allowed=True)
    return reference.layer_norm(x, weight, bias, eps)
