"""Collects partial column sums and adds them up in one launch."""

from torch import Tensor

from fastvit_kernels.dispatch import HAS_TRITON
from fastvit_kernels.registration import cdiv

if HAS_TRITON:
    from fastvit_kernels.column_sums import kernels
    from fastvit_kernels.launch import launch

BLOCK_M, BLOCK_N = 64, 32


class ColumnSums:
    """The column sums of a backward pass, such as gradients of biases.

    A kernel that reads a matrix anyway writes one row of sums for each of its programs. `add` notes where they are, and
    `launch` adds up all of them in a fixed order: one launch for a whole block, and the same bits in every run.
    """

    def __init__(self) -> None:
        self.noted: list[tuple[Tensor, tuple[Tensor, ...], int, int]] = []
        self.blocks = 0

    def add(self, partial: Tensor, *outs: Tensor) -> None:
        """Notes that out [width], any floating dtype, shall hold the sums of the rows of partial [programs, width].

        With several `outs`, partial is [outs, programs, width]. It is float32 and contiguous.
        """
        *_, programs, width = partial.shape
        self.noted.append((partial, outs, programs, width))
        self.blocks += cdiv(width, BLOCK_N) * len(outs)

    def launch(self) -> None:
        """Writes all that was added since the last launch."""
        if not self.noted:
            return
        launch(
            kernels.column_sums_kernel, (self.blocks,), tuple(self.noted), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4
        )
        self.noted.clear()
        self.blocks = 0
