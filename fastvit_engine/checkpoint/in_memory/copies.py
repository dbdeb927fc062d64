"""What training sees of copies in memory: one call after each step, and one before each update."""

import math
import time
import uuid
from collections.abc import Callable, Mapping

from fastvit_engine.checkpoint.checkpointer import Checkpointer
from fastvit_engine.checkpoint.in_memory.across import HeldCopies
from fastvit_engine.checkpoint.in_memory.contents import Contents, Label, Unsettled
from fastvit_engine.checkpoint.in_memory.neighbour import Neighbour
from fastvit_engine.checkpoint.in_memory.store import MemoryStore
from fastvit_engine.checkpoint.store import Checkpoint
from fastvit_engine.checkpoint.trainer_state import TrainerState
from fastvit_engine.checkpoint.writer import HostCopy, file_name

_COST = 0.02  # most of the time that copies may take; steps shorter than that allows share one


class Copies:
    """Copies the state of the run into the areas of its ranks, and of the next node; does nothing without areas.

    A copy is whole on all ranks, and with their neighbours, before any of them begins the next one: each waits in
    `before_update`, and no rank ends a step before all have passed that, because the guard adds up the losses of all of
    them in between. So of two slots one always holds a step that every rank has.
    """

    def __init__(self, held: HeldCopies, checkpointer: Checkpointer) -> None:
        self._held, self._checkpointer, self._world = held, checkpointer, held.world
        checkpointer.before_reading = self._fetch
        self._own, self._neighbour = held.own, None
        if self._own is not None and held.guest is not None and held.messages is not None:
            self._neighbour = Neighbour(self._own, held.guest, held.messages, held.world)
        self._host_copy = HostCopy()
        self._contents: Contents | None = None  # of the last copy
        self._label, self._sequence = Label("", 0, 0), 0  # of this start; of the last copy
        self._every, self._due = 1, 0  # steps between copies; the step of the next
        self._seconds, self._count = 0.0, 0  # that copies took so far
        self.unsettled: Unsettled | None = None  # of this rank in the copy that training continues from, if it does

    def continue_from(self, checkpoint: Checkpoint | None) -> None:
        """Training is about to start from there, as loaded: drops all copies but that one, if it is one. Collective."""
        self.unsettled, sequence = None, None
        if self._own is None:
            return
        self.close()
        self._contents = None  # which holds the tensors that loading replaces
        if checkpoint is not None and isinstance(checkpoint.store, MemoryStore):
            sequence = checkpoint.store.sequence
            self.unsettled = checkpoint.store.unsettled(self._world.rank)
            checkpoint.store.fetched.clear()
        start = self._world.on_main(lambda: uuid.uuid4().hex)
        for area in self._held.areas:
            area.keep_only(sequence)
        self._world.barrier()  # none begins while another still has later copies
        self._label = Label(start, self._world.size, self._world.rank)
        self._sequence, self._due = sequence or 0, (0 if checkpoint is None else checkpoint.step) + self._every

    def forget(self) -> None:
        """Drops all copies: nothing may continue from what they hold. Collective."""
        self.continue_from(None)

    def after_step(self, step: int, state: Callable[[], TrainerState], unsettled: Callable[[], Unsettled]) -> None:
        """Begins to copy the state after `step` steps, if it is time again. What is written of them must be written."""
        if self._own is None or step < self._due:
            return
        started = time.thread_time()
        tensors, contents = self._checkpointer.tensors_to_write(), self._contents
        if contents is None or not contents.is_for(tensors):
            contents = self._contents = Contents.of(self._checkpointer, state(), tensors, file_name(self._world.rank))
            started = time.thread_time()  # what is done once says nothing of the copies to come
        description = contents.describe(self._label, state(), self._checkpointer.engine.scalars(), unsettled())
        own, neighbour = self._own, self._neighbour
        slot = own.begin(contents.size, len(description))
        sequence, self._due = self._sequence + 1, step + self._every
        self._sequence = sequence
        spent = time.thread_time() - started

        def commit() -> None:
            own.commit(slot, sequence, step, description)
            self._seconds += spent + time.thread_time()  # of the thread, which began with the copy
            self._count += 1
            if neighbour is not None:
                neighbour.begin(slot, contents.size, sequence, step, description)

        self._host_copy.begin_in(contents.transfer_to(own, slot), commit)

    def before_update(self, step: int) -> None:
        """Returns when weights and optimizer state may change, because all that is being copied is there.

        step: which the update completes. If a copy follows it, the neighbour must have the one before.
        """
        self._host_copy.wait()
        if self._neighbour is not None and step >= self._due:
            self._neighbour.wait()

    def settle(self, step_seconds: float) -> None:
        """Copies as often as their cost allows, alike on all ranks, now that steps take so long; collective."""
        if self._own is None:
            return
        self._host_copy.wait()
        if self._count:
            seconds, on_the_way = self._seconds, 0.0
            if self._neighbour is not None:
                seconds += self._neighbour.processor_seconds
                on_the_way = self._neighbour.seconds / self._count
            most = max(seconds / self._count / _COST, on_the_way) / step_seconds
            self._every = max(1, round(self._world.max([math.ceil(most)]).item()))

    def close(self) -> None:
        """Returns when nothing is being copied any more; raises what went wrong."""
        self._host_copy.wait()
        if self._neighbour is not None:
            self._neighbour.wait()

    def _fetch(self, checkpoint: Checkpoint, ranges: Mapping[str, tuple[int, int]]) -> None:
        if isinstance(checkpoint.store, MemoryStore):
            self._held.fetch(checkpoint.store, ranges)
