"""What Triton kernels share that make FP8 operands, or find the largest magnitudes for them.

The scales are those of `scales.py`, bit for bit.
"""

import triton
import triton.language as tl


@triton.jit
def magnitude_bits(x):
    """|x| of float32 x as int32, whose order is that of the magnitudes; NaN is above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scales(bits, TOP: tl.constexpr):
    """Scales, their inverses, and whether they are out of range; see `scales.scales`."""
    exponent = TOP + 127 - (bits >> 23) - ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    finite = bits < 0x7F800000
    overflows = (finite == 0) | ((exponent > 63) & (bits > 0))
    exponent = tl.where(bits == 0, 0, tl.minimum(exponent, 63))
    scale = tl.where(finite, (127 + exponent) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    inverse = tl.where(finite, (127 - exponent) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    return scale, inverse, overflows


@triton.jit
def in_fp8(x, dtype: tl.constexpr):
    LARGEST: tl.constexpr = 448.0 if dtype == tl.float8e4nv else 57344.0
    return tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit
def top_of(dtype: tl.constexpr):
    return 8 if dtype == tl.float8e4nv else 15


@triton.jit
def count_overflow(overflows_ptr, overflows):
    """Notes that some of these scales, a block of them, are out of range."""
    some = tl.max(overflows.to(tl.int32), axis=None)
    tl.atomic_max(overflows_ptr, some, mask=some > 0)


@triton.jit
def store_maxima(
    value,  # float32 [BLOCK_M, BLOCK_N], 0 where masked
    row,
    column,
    row_mask,
    column_mask,
    slot,
    row_bits_ptr,
    column_bits_ptr,
    whole_bits_ptr,
    SLOTS: tl.constexpr,
):
    """The largest magnitudes of a tile, of rows, columns or all, into what is there."""
    bits = magnitude_bits(value)
    if row_bits_ptr is not None:
        tl.atomic_max(row_bits_ptr + row, tl.max(bits, axis=1), mask=row_mask)
    if column_bits_ptr is not None:
        tl.atomic_max(column_bits_ptr + column, tl.max(bits, axis=0), mask=column_mask)
    if whole_bits_ptr is not None:
        tl.atomic_max(whole_bits_ptr + slot % SLOTS, tl.max(tl.max(bits, axis=1), axis=0))
