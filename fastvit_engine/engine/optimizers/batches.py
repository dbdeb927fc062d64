"""Elementwise work on many tensors at once, in batches whose temporary results take little memory."""

from collections.abc import Iterator, Sequence

from torch import Tensor

BATCH = 2**24  # elements: enough to keep a GPU busy, and 64 MB for each temporary result in fp32

Batch = tuple[list[int], tuple[list[Tensor], ...]]


def in_batches(*columns: Sequence[Tensor], size: int = BATCH) -> Iterator[Batch]:
    """Corresponding pieces of the 1-D tensors in each column, at most `size` elements of a column at a time.

    Yields the number of the row that each piece is from, and the pieces of each column, which are views.
    """
    rows: list[int] = []
    batch: tuple[list[Tensor], ...] = tuple([] for _ in columns)
    held = 0
    for row, tensors in enumerate(zip(*columns, strict=True)):
        for start in range(0, tensors[0].numel(), size):
            count = min(size, tensors[0].numel() - start)
            if held + count > size:
                yield rows, batch
                rows, batch, held = [], tuple([] for _ in columns), 0
            rows.append(row)
            for pieces, tensor in zip(batch, tensors, strict=True):
                pieces.append(tensor.narrow(0, start, count))
            held += count
    if rows:
        yield rows, batch
