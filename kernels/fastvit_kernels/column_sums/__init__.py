"""Column sums that leave kernels as one row per program, added up by one launch at the end."""

from fastvit_kernels.column_sums.sums import ColumnSums

__all__ = ["ColumnSums"]
