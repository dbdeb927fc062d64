"""Windows of samples that a run leaves out: positions of its order (see `order`), from the first to before the last.

Each is whole steps that a run met trouble with. So the start of a step stays a pure function of (consumed, skipped),
with `consumed` the first position after the last step that was trained on.
"""

from collections.abc import Iterator, Sequence

from fastvit_engine.errors import UserError

Window = tuple[int, int]  # [first, last)


def step_start(consumed: int, skipped: Sequence[Window]) -> int:
    """The first position from `consumed` on that is in no window."""
    for first, last in sorted(skipped):
        if first <= consumed < last:
            consumed = last
    return consumed


def step_starts(consumed: int, batch: int, skipped: Sequence[Window]) -> Iterator[int]:
    """Where each step from `consumed` on starts, endlessly. Raises UserError for windows that are not whole steps."""
    for first, last in skipped:
        if (first - consumed) % batch or (last - consumed) % batch:
            raise UserError(
                f"recovery.json says to skip the samples [{first}, {last}), which are not whole steps of {batch}: "
                "correct that window"
            )
    while True:
        start = step_start(consumed, skipped)
        yield start
        consumed = start + batch
