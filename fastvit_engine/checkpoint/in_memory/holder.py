"""The launcher's side: memory for the copies of all ranks, which stays when they are killed."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fastvit_engine.checkpoint.in_memory.area import DESCRIPTORS, Area, newest_common


class Holder:
    """The areas of so many ranks, empty at first."""

    def __init__(self, ranks: int) -> None:
        self.areas = [Area(os.memfd_create(f"fastvit-rank-{rank}")) for rank in range(ranks)]

    @property
    def environment(self) -> dict[str, str]:
        """What tells ranks that they have inherited them."""
        return {DESCRIPTORS: ",".join(str(area.descriptor) for area in self.areas)}

    @property
    def newest_step(self) -> int | None:
        """Of the newest copy that all ranks have whole."""
        sequence = newest_common(self.areas)
        return None if sequence is None else self.areas[0].copies()[sequence].step

    def forget(self) -> None:
        """Drops all copies, while no rank is alive."""
        for area in self.areas:
            area.keep_only(None)

    def close(self) -> None:
        for area in self.areas:
            os.close(area.descriptor)


@contextmanager
def held_copies(ranks: int) -> Iterator[Holder]:
    """Memory for copies while the block lasts, on Linux."""
    holder = Holder(ranks)
    try:
        yield holder
    finally:
        holder.close()


def can_hold() -> bool:
    return sys.platform == "linux" and hasattr(os, "memfd_create")
