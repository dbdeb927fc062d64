"""Copies in memory, read as a checkpoint, wherever the parts of the ranks are."""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastvit_engine.checkpoint.format import DamagedCheckpoint
from fastvit_engine.checkpoint.in_memory.area import Area
from fastvit_engine.checkpoint.in_memory.contents import Described, Unsettled
from fastvit_engine.checkpoint.store import step_name
from fastvit_engine.checkpoint.writer import file_name


@dataclass(frozen=True)
class Part:
    """A rank's part of the state, as this process finds it."""

    description: bytes
    area: Area | None  # of this node, that has it
    sources: list[int]  # the ranks that have it in an area of theirs


class MemoryStore:
    """What reading needs of a CheckpointStore, of one checkpoint.

    Parts that are on other nodes only can be read once they are in `fetched`, which is by file and like the whole file.
    """

    has_checksums = False

    def __init__(self, sequence: int, step: int, parts: Mapping[int, Part]) -> None:
        """sequence: number of the copy. parts: by rank."""
        self.sequence, self.step = sequence, step
        self.parts = {file_name(rank): parts[rank] for rank in sorted(parts)}
        self.fetched: dict[str, mmap.mmap] = {}

    def __reduce__(self) -> Any:
        """For another process, it has nothing: that one has its own."""
        return MemoryStore, (self.sequence, self.step, {})

    def describe(self, name: str) -> str:
        return f"memory of the launcher, {name}".rstrip(", ")

    def read(self, name: str, file: str) -> bytes:
        """The manifest, of those of all ranks."""
        manifests = [self._described(of_rank).manifest for of_rank in self.parts]
        files = {file: stored for manifest in manifests for file, stored in manifest.files.items()}
        whole = replace(manifests[0], files=files)
        if (gap := whole.gap()) is not None:
            raise DamagedCheckpoint(f"{self.describe(name)}: {gap}")
        return whole.to_json()

    def unsettled(self, rank: int) -> Unsettled:
        """What a rank had counted by itself."""
        return self._described(file_name(rank)).unsettled

    def map(self, name: str, file: str, size: int, start: int, stop: int) -> mmap.mmap:
        if (area := self.parts[file].area) is not None:
            return area.map(area.copies()[self.sequence].start, size)
        if file not in self.fetched:
            raise DamagedCheckpoint(f"{self.describe(name)}/{file} is on another node")
        return self.fetched[file]

    def _described(self, file: str) -> Described:
        return Described.read(self.parts[file].description, f"{self.describe(step_name(self.step))}/{file}")
