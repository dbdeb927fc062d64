"""Scales of FP8 operands: powers of two, from the largest magnitude that they scale.

The scale is the largest power of two that keeps the largest magnitude within the format: multiplying by it, and
dividing the product by it, is exact, so that the only rounding is that to 8 bits, and a value is rounded alike in both
layouts that a tensor is stored in. Magnitudes are handled as the bits of float32, whose order is that of the numbers,
infinity and NaN above them, so that a maximum is exact in any order and never loses a NaN.

A scale is out of range, and counts as an overflow, if the largest magnitude is not finite, or so small that the scale
would exceed 2^63, beyond which the product of two inverse scales is no normal float32. It is 2^63 then, and values are
still scaled; of a magnitude that is not finite the scale is NaN, and so is the result. A matrix of zeros has the scale
1 and is no overflow.
"""

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOP = {E4M3: 8, E5M2: 15}  # exponent of the largest number, which is 1.75 * 2^TOP in both formats
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
MOST = 63  # largest exponent of a scale


def magnitude_bits(x: Tensor) -> Tensor:
    """|x| as int32, whose order is that of the magnitudes; NaN is above infinity."""
    return x.float().view(torch.int32) & 0x7FFFFFFF


def exponents(bits: Tensor, top: int) -> Tensor:
    """Exponents of the scales, int32, given the bits of the largest magnitudes; not clamped, nor for zeros."""
    return top + 127 - (bits >> 23) - ((bits & 0x7FFFFF) > 0x600000).int()


def scales(bits: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and their inverses, float32, and whether they are out of range, given bits of the largest magnitudes."""
    exponent, finite = exponents(bits, top), bits < 0x7F800000
    overflows = ~finite | ((exponent > MOST) & (bits > 0))
    exponent = torch.where(bits == 0, 0, exponent.clamp(max=MOST))
    scale, inverse = (((127 + sign * exponent) << 23).view(torch.float32) for sign in (1, -1))
    return scale.masked_fill(~finite, torch.nan), inverse.masked_fill(~finite, torch.nan), overflows
