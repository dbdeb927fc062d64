"""Windows of samples that a run leaves out: positions of its order (see `order`), from the first to before the last.

Most are whole steps that a run met trouble with. A step that has a position in a window is left out whole: this matters
if the batch has changed since, or a window was written by hand. So the start of a step is a pure function of (consumed,
batch, skipped), with `consumed` the first position after the last step that was trained on.
"""

from collections.abc import Iterator, Sequence

Window = tuple[int, int]  # [first, last)


def step_start(consumed: int, batch: int, skipped: Sequence[Window]) -> int:
    """Where the next step of `batch` samples after `consumed` starts: whole steps later, if windows are in the way."""
    for first, last in sorted(skipped):
        if first < consumed + batch and consumed < last:
            consumed += -(-(last - consumed) // batch) * batch
    return consumed


def step_starts(consumed: int, batch: int, skipped: Sequence[Window]) -> Iterator[int]:
    """Where each step from `consumed` on starts, endlessly."""
    while True:
        start = step_start(consumed, batch, skipped)
        yield start
        consumed = start + batch
