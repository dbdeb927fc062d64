"""The launcher's side: memory for the copies of all ranks, which stays when they are killed."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fastvit_engine.checkpoint.in_memory.area import Area, newest_common
from fastvit_engine.checkpoint.in_memory.held import INHERITED, MEMORY_NAME, OF_NODE


class Holder:
    """The areas of so many ranks, empty at first; with as many guest areas if there is to be a node before this one."""

    def __init__(self, ranks: int, *, guests: bool = False) -> None:
        self.areas = _areas(ranks, "rank")
        self.guests = _areas(ranks, "guest") if guests else []

    @property
    def environment(self) -> dict[str, str]:
        """What tells ranks that they have inherited the areas."""
        return {INHERITED: _descriptors(self.areas)}

    @property
    def environment_of_node(self) -> dict[str, str]:
        """What tells ranks where to open areas and guest areas."""
        return {OF_NODE: f"/proc/{os.getpid()}/fd {_descriptors(self.areas)} {_descriptors(self.guests)}"}

    @property
    def newest_step(self) -> int | None:
        """Of the newest copy that all ranks here have whole."""
        sequence = newest_common(self.areas)
        return None if sequence is None else self.areas[0].copies()[sequence].step

    def forget(self) -> None:
        """Drops all copies, while no rank is alive."""
        for area in (*self.areas, *self.guests):
            area.keep_only(None)

    def close(self) -> None:
        for area in (*self.areas, *self.guests):
            os.close(area.descriptor)


@contextmanager
def held_copies(ranks: int, *, guests: bool = False) -> Iterator[Holder]:
    """Memory for copies while the block lasts, on Linux."""
    holder = Holder(ranks, guests=guests)
    try:
        yield holder
    finally:
        holder.close()


def can_hold() -> bool:
    return sys.platform == "linux" and hasattr(os, "memfd_create")


def _areas(count: int, name: str) -> list[Area]:
    return [Area(os.memfd_create(f"{MEMORY_NAME}{name}-{number}")) for number in range(count)]


def _descriptors(areas: Sequence[Area]) -> str:
    return ",".join(str(area.descriptor) for area in areas)
