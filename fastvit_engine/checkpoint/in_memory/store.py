"""Copies in memory, read as a checkpoint: the newest step that every rank has whole."""

import mmap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastvit_engine.checkpoint.format import DamagedCheckpoint
from fastvit_engine.checkpoint.in_memory.area import Area, newest_common
from fastvit_engine.checkpoint.in_memory.contents import Described, Unsettled
from fastvit_engine.checkpoint.store import Checkpoint, step_name
from fastvit_engine.checkpoint.writer import file_name


class MemoryStore:
    """What reading needs of a CheckpointStore, of one checkpoint. The areas are those of all ranks of one machine."""

    has_checksums = False

    def __init__(self, areas: Sequence[Area]) -> None:
        self._areas = list(areas)

    def describe(self, name: str) -> str:
        return f"memory of the launcher, {name}".rstrip(", ")

    @property
    def sequence(self) -> int | None:
        """Of the copy that is the checkpoint, if there is one."""
        return newest_common(self._areas)

    def names(self) -> list[str]:
        sequence = self.sequence
        return [] if sequence is None else [step_name(self._areas[0].copies()[sequence].step)]

    def latest(self) -> str | None:
        return next(iter(self.names()), None)

    def read(self, name: str, file: str) -> bytes:
        """The manifest, of those of all ranks."""
        manifests = [described.manifest for described in self._of_ranks(name)]
        files = {file: stored for manifest in manifests for file, stored in manifest.files.items()}
        whole = replace(manifests[0], files=files)
        if (gap := whole.gap()) is not None:
            raise DamagedCheckpoint(f"{self.describe(name)}: {gap}")
        return whole.to_json()

    def unsettled(self, name: str, rank: int) -> Unsettled:
        """What a rank had counted by itself."""
        return self._of_ranks(name)[rank].unsettled

    def map(self, name: str, file: str, size: int, start: int, stop: int) -> mmap.mmap:
        rank = next(rank for rank in range(len(self._areas)) if file_name(rank) == file)
        sequence = self.sequence
        if sequence is None or self.names() != [name]:
            raise DamagedCheckpoint(f"{self.describe(name)} is not there any more")
        return self._areas[rank].map(self._areas[rank].copies()[sequence].start, size)

    def _of_ranks(self, name: str) -> list[Described]:
        """What the copies of all ranks say of themselves."""
        sequence = self.sequence
        if sequence is None or self.names() != [name]:
            raise DamagedCheckpoint(f"{self.describe(name)} is not there any more")
        return [Described.read(area.copies()[sequence].description, self.describe(name)) for area in self._areas]


def newest_in_memory(areas: Sequence[Area], world_size: int) -> Checkpoint | None:
    """The newest state of a run of so many processes, if the launcher has copies of it."""
    if len(areas) != world_size:
        return None
    store: Any = MemoryStore(areas)  # which lacks what saving needs of a store
    return next((Checkpoint(store, name) for name in store.names()), None)
