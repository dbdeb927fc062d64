"""Copies of all nodes together: which state they hold, and how a rank gets parts that its own node lacks."""

import mmap
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastvit_engine.checkpoint.format import DamagedCheckpoint
from fastvit_engine.checkpoint.in_memory.area import Area
from fastvit_engine.checkpoint.in_memory.contents import label_of
from fastvit_engine.checkpoint.in_memory.held import Held
from fastvit_engine.checkpoint.in_memory.messages import Messages
from fastvit_engine.checkpoint.in_memory.store import MemoryStore, Part
from fastvit_engine.checkpoint.store import Checkpoint, step_name
from fastvit_engine.distributed.world import World
from fastvit_engine.errors import UserError
from fastvit_engine.shown import say


class HeldCopies:
    """The areas that a rank writes to, among those of its node and of all nodes; none without a launcher that holds."""

    def __init__(self, held: Held, world: World, open_messages: Callable[[], Messages]) -> None:
        """Collective. open_messages: to other nodes. UserError if the nodes hold different things."""
        self.world, self._held, self._here = world, held, world.rank - world.node_ranks.start
        sizes = set(world.gather((len(held.own), len(world.node_ranks))))
        if any(areas for areas, _ in sizes) and (len(sizes) > 1 or len(held.own) != len(world.node_ranks)):
            found = " and ".join(f"{areas} of {processes} processes" for areas, processes in sorted(sizes))
            raise UserError(
                "checkpoint.in_memory = true needs the same launcher and as many processes on each node, and launchers "
                f"keep copies of {found}: set checkpoint.in_memory=false"
            )
        several = bool(held.guests) and world.size > len(held.own)
        self.messages = open_messages() if several else None  # None: there is one node

    @property
    def own(self) -> Area | None:
        return self._held.own[self._here] if self._held.own else None

    @property
    def guest(self) -> Area | None:
        """For the copies of the same local rank of the node before; None if there is one node."""
        return self._held.guests[self._here] if self.messages is not None else None

    @property
    def areas(self) -> list[Area]:
        """Those that this rank writes to, or wrote to while there were other nodes."""
        return [areas[self._here] for areas in (self._held.own, self._held.guests) if areas]

    @property
    def taken_bytes(self) -> int:
        """Memory of this node that copies take already."""
        return sum(area.size for area in self._held.areas)

    def newest(self) -> Checkpoint | None:
        """The newest state of a run of so many processes of which every rank's part is somewhere; collective.

        Says so if there are copies, and no such state.
        """
        if not self.areas:
            return None
        found: dict[tuple[int, int, str], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        own = {(label_of(c.description), c.sequence): c for area in self.areas for c in area.copies().values()}
        copies = self.world.gather([(label, sequence, copy.step) for (label, sequence), copy in own.items()])
        for holder, of_holder in enumerate(copies):
            for label, sequence, step in of_holder:
                if label.world_size == self.world.size:
                    found[step, sequence, label.start][label.rank].append(holder)
        whole = [key for key, sources in found.items() if len(sources) == self.world.size]
        if not whole:
            if self.world.is_main and any(copies):
                size = f"{self.world.size} processes"
                say(f"the copies in memory are not the whole state of {size}: continuing from the disk")
            return None
        step, sequence, start = max(whole)
        sources = found[step, sequence, start]
        mine = {
            label.rank: copy.description
            for (label, number), copy in own.items()
            if (number, label.start) == (sequence, start) and sources[label.rank][0] == self.world.rank
        }
        descriptions = {rank: text for part in self.world.gather(mine) for rank, text in part.items()}
        here = self._on_this_node(sequence, start)
        parts = {rank: Part(descriptions[rank], here.get(rank), sources[rank]) for rank in sources}
        store: Any = MemoryStore(sequence, step, parts)  # which lacks what saving needs of a store
        return Checkpoint(store, step_name(step))

    def fetch(self, store: MemoryStore, ranges: Mapping[str, tuple[int, int]]) -> None:
        """Brings bytes [first, last) of the files that this rank needs, if its node lacks them; collective.

        Raises DamagedCheckpoint if some were altered on their way.
        """
        if self.messages is None:
            return
        missing = {file: part for file, part in ranges.items() if store.parts[file].area is None}
        everyone = self.world.gather(missing)
        # All ranks take their turns in the same order, so that none waits for one that waits for it.
        turns = [(file, rank, part) for rank, needs in enumerate(everyone) for file, part in needs.items()]
        damage: DamagedCheckpoint | None = None
        for file, reader, (first, last) in sorted(turns):
            sources = store.parts[file].sources
            source = sources[reader % len(sources)]
            if source == self.world.rank:
                self._send(store, file, first, last, reader)
            elif reader == self.world.rank:
                try:
                    store.fetched[file] = self._receive(first, last, source)
                except DamagedCheckpoint as error:  # the others still wait for their turns with this rank
                    damage = error
        if damage is not None:
            raise damage

    def _send(self, store: MemoryStore, file: str, first: int, last: int, reader: int) -> None:
        assert self.messages is not None
        area = store.parts[file].area
        assert area is not None  # of this rank, so of this node
        memory = area.map(area.copies()[store.sequence].start, last)
        self.messages.send([], [torch.frombuffer(memory, dtype=torch.uint8)[first:last]], reader)()

    def _receive(self, first: int, last: int, source: int) -> mmap.mmap:
        assert self.messages is not None
        memory = mmap.mmap(-1, last)
        part = torch.frombuffer(memory, dtype=torch.uint8)[first:last]
        self.messages.receive(0, 1, source, lambda _: [part])
        return memory

    def _on_this_node(self, sequence: int, start: str) -> dict[int, Area]:
        """The area that has the copy of a rank, of those on this node that have one."""
        found = {}
        for area in self._held.areas:
            if (copy := area.copies().get(sequence)) is not None:
                label = label_of(copy.description)
                if label.start == start:
                    found[label.rank] = area
        return found
