"""What a pass over a matrix leaves of it for a product in FP8, so that it need not be read again for that."""

from typing import NamedTuple

import torch
from torch import Tensor

SLOTS = 64  # numbers that the largest magnitude of a whole matrix is gathered in


class Maxima(NamedTuple):
    """Where a pass over a matrix [T, K] leaves its largest magnitudes, as bits: int32, 0 before the pass."""

    row: Tensor | None = None  # [T]
    column: Tensor | None = None  # [K]
    whole: Tensor | None = None  # [SLOTS]


class RowsOfPass(NamedTuple):
    """Where a pass that holds whole rows of a matrix [T, K] leaves it in FP8 with a scale per row."""

    values: Tensor  # FP8 [T, K]
    inverse: Tensor  # [T] float32: of the scales
    overflows: Tensor  # int32 [1]: 1 if a scale is out of range


class Handoff(NamedTuple):
    """Either the matrix in FP8, or the largest magnitude of all of it; or nothing."""

    rows: RowsOfPass | None = None
    maxima: Maxima | None = None

    def pointers(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """What kernels take: values, inverses, the largest magnitude, and overflows."""
        values, inverse, overflows = (None, None, None) if self.rows is None else self.rows
        return values, inverse, None if self.maxima is None else self.maxima.whole, overflows


NOTHING = Handoff()


def empty_maxima(like: Tensor, by_rows: bool, *, rows: bool, columns: bool) -> Maxima:
    """For a matrix [T, K] with the shape and device of `like`: of what its scales need."""
    tokens, width = like.shape
    if not by_rows:
        return Maxima(whole=like.new_zeros(SLOTS, dtype=torch.int32))
    split = tokens * rows
    both = like.new_zeros(split + width * columns, dtype=torch.int32)
    return Maxima(both[:split] if rows else None, both[split:] if columns else None)


def empty_handoff(like: Tensor, dtype: torch.dtype, by_rows: bool, overflows: Tensor) -> Handoff:
    """For a matrix [T, K] with the shape and device of `like`."""
    if not by_rows:
        return Handoff(maxima=empty_maxima(like, by_rows, rows=True, columns=False))
    values = like.new_empty(like.shape, dtype=dtype)
    return Handoff(rows=RowsOfPass(values, like.new_empty(like.shape[0], dtype=torch.float32), overflows))
