"""FP8 operands and their products in plain PyTorch: the arithmetic of the kernels, on any device."""

import torch
from torch import Tensor

from fastvit_kernels.fp8_scales.scales import LARGEST, TOP, magnitude_bits, scales


def quantise(
    x: Tensor, dtype: torch.dtype, by_rows: bool, *, rows: bool, columns: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """x [T, K] in FP8, as `quantise.Quantised` describes it, and whether a scale is out of range."""
    bits = magnitude_bits(x)
    given: list[Tensor | None] = []
    overflows = torch.zeros((), dtype=torch.bool, device=x.device)
    for wanted, matrix, of in ((rows, x, bits), (columns, x.T, bits.T)):
        if not wanted:
            given += [None, None]
            continue
        if of.numel() == 0:
            largest = of.new_zeros(of.shape[0] if by_rows else 1)
        else:
            largest = of.amax(dim=1) if by_rows else of.amax().view(1)
        scale, inverse, out_of_range = scales(largest, TOP[dtype])
        values = (matrix.float() * scale[:, None]).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)
        if matrix is not x:  # tokens are padded
            values = torch.nn.functional.pad(values.view(torch.uint8), (0, -values.shape[1] % 16)).view(dtype)
        given += [values.contiguous(), inverse]
        overflows = overflows | out_of_range.any()
    values_r, inverse_r, values_c, inverse_c = given
    return values_r, inverse_r, values_c, inverse_c, overflows


def multiply(
    a: Tensor, a_inverse: Tensor, b: Tensor, b_inverse: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """a b^T in `dtype`, plus bias [N], for FP8 a [M, K] and b [N, K]; added up in float32.

    Inverse scales are [1], or [M] and [N].
    """
    product = torch.mm(a.float(), b.float().T) * a_inverse[:, None] * b_inverse[None, :]
    return (product if bias is None else product + bias.float()).to(dtype)
