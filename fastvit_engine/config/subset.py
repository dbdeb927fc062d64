"""What data.subset means: a share of the training samples, or a number of them."""

from numbers import Integral, Real
from typing import Any

from fastvit_engine.errors import UserError


def check_share_or_count(value: Any) -> Any:
    """`value`, if it is a number that can be read in one way only. Raises ValueError.

    An integer from 2 on is a number of samples, and a number with a decimal point up to 1.0 a share. The integer 1 is
    neither: it could be all samples, or one. Text, such as 1e-3, is what Python reads in it.
    """
    if isinstance(value, str):
        try:
            value = int(value) if value.strip().isdecimal() else float(value)
        except ValueError:
            raise ValueError("write a share such as 0.1, or a number of samples such as 5000") from None
    if isinstance(value, Integral):
        if value == 1:
            raise ValueError("1 can be read as all samples or as one: write 1.0 for all of them")
        if value < 2:
            raise ValueError("a number of samples is at least 2, and a share has a decimal point, such as 0.1")
    elif not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise ValueError("a share is above 0 and at most 1.0, and a number of samples has no decimal point")
    return value


def subset_size(num_samples: int, share_or_count: float) -> int:
    """Samples of a subset of `num_samples`: of a share, the nearest number.

    Raises UserError if there are fewer samples, or the subset has none.
    """
    try:
        check_share_or_count(share_or_count)
    except ValueError as error:
        raise UserError(f"data.subset is {share_or_count!r}: {error}") from None
    is_count = isinstance(share_or_count, Integral)
    size = int(share_or_count) if is_count else round(float(share_or_count) * num_samples)
    if size > num_samples:
        raise UserError(f"data.subset is {size:,}, and data.train has {num_samples:,} samples: lower it")
    if size == 0:
        raise UserError(f"data.subset is {share_or_count} of {num_samples:,} samples, which is none: raise it")
    return size
