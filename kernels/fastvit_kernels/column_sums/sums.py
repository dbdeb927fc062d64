"""Collects partial column sums and adds them up in one launch."""

from torch import Tensor

from fastvit_kernels.dispatch import HAS_TRITON

if HAS_TRITON:
    from fastvit_kernels.column_sums import kernels

BLOCK_M, BLOCK_N = 64, 32


class ColumnSums:
    """The column sums of a backward pass, such as gradients of biases.

    A kernel that reads a matrix anyway writes one row of sums for each of its programs. `add` notes where they are, and
    `launch` adds up all of them in a fixed order: one launch for a whole block, and the same bits in every run.
    """

    def __init__(self) -> None:
        self.noted: list[tuple[Tensor, Tensor, int, int]] = []

    def add(self, partial: Tensor, out: Tensor) -> Tensor:
        """Returns `out` [width], any floating dtype, which holds the sums of partial [programs, width] after `launch`.

        `partial` is float32 and contiguous.
        """
        self.noted.append((partial, out, *partial.shape))  # type: ignore[arg-type]  # partial has two dimensions
        return out

    def launch(self) -> None:
        """Writes all that was added since the last launch."""
        if not self.noted:
            return
        blocks = sum(-(-width // BLOCK_N) for _, _, _, width in self.noted)
        kernels.column_sums_kernel[blocks,](tuple(self.noted), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4)
        self.noted.clear()
