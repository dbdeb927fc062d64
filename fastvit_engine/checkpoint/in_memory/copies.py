"""What training sees of copies in memory: one call after each step, and one before each update."""

import math
import time
from collections.abc import Callable, Sequence

from fastvit_engine.checkpoint.checkpointer import Checkpointer
from fastvit_engine.checkpoint.in_memory.area import Area
from fastvit_engine.checkpoint.in_memory.contents import Contents, Unsettled
from fastvit_engine.checkpoint.in_memory.store import MemoryStore
from fastvit_engine.checkpoint.store import Checkpoint
from fastvit_engine.checkpoint.trainer_state import TrainerState
from fastvit_engine.checkpoint.writer import HostCopy, file_name
from fastvit_engine.distributed.world import World

_COST = 0.02  # most of the time that copies may take; steps shorter than that allows share one


class Copies:
    """Copies the state of the run into the areas of its ranks; does nothing without areas.

    A copy is whole on all ranks before any of them begins the next one: each waits in `before_update`, and no rank ends
    a step before all have passed that, because the guard adds up the losses of all of them in between. So of two slots
    one always holds a step that every rank has.
    """

    def __init__(self, areas: Sequence[Area], checkpointer: Checkpointer, world: World) -> None:
        self._areas = areas if len(areas) == world.size else ()
        self._checkpointer, self._world = checkpointer, world
        self._host_copy = HostCopy()
        self._contents: Contents | None = None  # of the last copy
        self._sequence = 0
        self._every, self._last = 1, 0  # steps between copies; the step of the last
        self._seconds, self._count = 0.0, 0  # that copies took so far
        self.unsettled: Unsettled | None = None  # of this rank in the copy that training continues from, if it does

    @property
    def _own(self) -> Area:
        return self._areas[self._world.rank]

    def continue_from(self, checkpoint: Checkpoint | None) -> None:
        """Training is about to start from there: drops all copies but that one, if it is one. Collective."""
        self.unsettled, sequence = None, None
        if not self._areas:
            return
        self._host_copy.wait()
        if checkpoint is not None and isinstance(checkpoint.store, MemoryStore):
            sequence = checkpoint.store.sequence
            self.unsettled = checkpoint.store.unsettled(checkpoint.name, self._world.rank)
        self._world.barrier()  # all have read what they need
        self._own.keep_only(sequence)
        self._world.barrier()  # none begins while another still has later copies
        self._sequence, self._last = sequence or 0, 0 if checkpoint is None else checkpoint.step

    def forget(self) -> None:
        """Drops all copies: nothing may continue from what they hold. Collective."""
        self.continue_from(None)

    def after_step(self, step: int, state: Callable[[], TrainerState], unsettled: Callable[[], Unsettled]) -> None:
        """Begins to copy the state after `step` steps, if it is time again. What is written of them must be written."""
        if not self._areas or step < self._last + self._every:
            return
        started = time.thread_time()
        tensors, contents = self._checkpointer.tensors_to_write(), self._contents
        if contents is None or not contents.lies_in(tensors):
            contents = self._contents = Contents.of(self._checkpointer, state(), tensors, file_name(self._world.rank))
            started = time.thread_time()  # what is done once says nothing of the copies to come
        description = contents.describe(state(), self._checkpointer.engine.scalars(), unsettled())
        slot = self._own.begin(contents.size, len(description))
        sequence, self._last = self._sequence + 1, step
        self._sequence = sequence
        spent = time.thread_time() - started

        def commit() -> None:
            self._own.commit(slot, sequence, step, description)
            self._seconds += spent + time.thread_time()  # of the thread, which began with the copy
            self._count += 1

        self._host_copy.begin_in(contents.transfer_to(self._own, slot), commit)

    def before_update(self) -> None:
        """Returns when weights and optimizer state may change, because all that is being copied is there."""
        self._host_copy.wait()

    def settle(self, step_seconds: float) -> None:
        """Copies as often as their cost allows, alike on all ranks, now that steps take so long; collective."""
        if not self._areas:
            return
        self._host_copy.wait()
        if self._count:
            cost = self._seconds / self._count
            self._every = round(self._world.max([math.ceil(cost / (_COST * step_seconds))]).item())
