"""The areas that a launcher holds for the ranks of this node, as a rank finds them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fastvit_engine.checkpoint.in_memory.area import Area
from fastvit_engine.errors import UserError

MEMORY_NAME = "fastvit-"  # how the names of areas begin
INHERITED = "FASTVIT_COPIES"  # descriptors of the areas, by local rank: this process has inherited them
# A folder of descriptors, those of the areas by local rank, and those of the guest areas: "/proc/7/fd 3,4 5,6".
OF_NODE = "FASTVIT_COPIES_OF_NODE"


@dataclass(frozen=True)
class Held:
    """Memory of one node that outlives its ranks."""

    own: Sequence[Area] = ()  # for the copies of its ranks, by local rank
    guests: Sequence[Area] = ()  # for those of the ranks of the node before it, likewise

    @property
    def areas(self) -> list[Area]:
        return [*self.own, *self.guests]


def held_here(asked: Literal["auto"] | bool, environment: Mapping[str, str] = os.environ) -> Held:
    """What the launcher of this process holds for a run with checkpoint.in_memory as `asked`; nothing if no one does.

    `fastvit train` has decided already. torchrun's agent knows nothing of the run and holds in any case: there, only
    `true` counts. Raises UserError if that cannot be opened.
    """
    if inherited := environment.get(INHERITED):
        return Held([Area(int(number)) for number in inherited.split(",")])
    if asked is not True or OF_NODE not in environment:
        return Held()
    folder, *groups = environment[OF_NODE].split(" ")
    own, guests = ([_open(f"{folder}/{number}") for number in group.split(",")] for group in groups)
    return Held(own, guests)


def _open(path: str) -> Area:
    """An area of the agent, opened once more: torchrun lets its processes inherit nothing."""
    why = "it is another file, so the agent that held it has ended"
    try:
        if os.readlink(path).startswith(f"/memfd:{MEMORY_NAME}"):  # else it must not be written to
            return Area(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        why = str(error.strerror)
    raise UserError(
        f"checkpoint.in_memory = true, and the memory that the agent of this node holds, {path}, cannot be opened "
        f"({why}): run agent and processes as one user in one container, or set checkpoint.in_memory=false"
    )
