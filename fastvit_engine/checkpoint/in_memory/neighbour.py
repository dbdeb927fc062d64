"""Copies on another node: each rank sends its own to the same local rank of the next node, and takes in a guest's.

The nodes form a ring. Both ends are at the same copy at any time, because all ranks copy after the same steps, and
none begins a copy before all have exchanged the one before it: see `Copies`.
"""

import sys
import time
from collections.abc import Sequence
from threading import Thread

import torch
from torch import Tensor

from fastvit_engine.checkpoint.format import DamagedCheckpoint
from fastvit_engine.checkpoint.in_memory.area import Area, Slot
from fastvit_engine.checkpoint.in_memory.messages import Messages
from fastvit_engine.distributed.world import World
from fastvit_engine.shown import say


class Neighbour:
    """One rank's exchange with the nodes before and after it."""

    def __init__(self, own: Area, guest: Area, messages: Messages, world: World) -> None:
        """own: what to send from. guest: what to keep the copies of the node before in."""
        self._own, self.guest, self._messages = own, guest, messages
        node = len(world.node_ranks)
        self._next, self._before = (world.rank + node) % world.size, (world.rank - node) % world.size
        self._thread: Thread | None = None
        self._error: Exception | None = None
        self.seconds, self.processor_seconds = 0.0, 0.0  # of all exchanges so far

    def begin(self, slot: Slot, size: int, sequence: int, step: int, description: bytes) -> None:
        """Begins to send a whole copy, whose slot must not change before `wait`, and to take in the guest's."""
        data = torch.frombuffer(self._own.memory(slot), dtype=torch.uint8)[:size]
        copy = [sequence, step, size, len(description)], [data, _bytes(description)]
        self._thread = Thread(target=self._exchange, args=copy, name="copy for the next node", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when all is sent and taken in; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _exchange(self, numbers: Sequence[int], contents: Sequence[Tensor]) -> None:
        began = time.monotonic()
        try:
            sent = self._messages.send(numbers, contents, to=self._next)
            self._take_in()
            sent()
        except Exception as error:  # to be raised in whoever waits
            self._error = error
        self.seconds += time.monotonic() - began
        self.processor_seconds += time.thread_time()  # of the thread, which began with the exchange

    def _take_in(self) -> None:
        slots: list[Slot] = []
        description = torch.empty(0, dtype=torch.uint8)

        def memory(numbers: Sequence[int]) -> Sequence[Tensor]:
            nonlocal description
            _, _, size, length = numbers
            slots.append(self.guest.begin(size, length))
            description = torch.empty(length, dtype=torch.uint8)
            return [torch.frombuffer(self.guest.memory(slots[0]), dtype=torch.uint8)[:size], description]

        try:
            sequence, step, _, _ = self._messages.receive(4, 2, self._before, memory)
        except DamagedCheckpoint as damage:  # one less: the copy before and the next one are others
            say(f"fastvit: warning: {damage}, and is not kept", file=sys.stderr)
            return
        self.guest.commit(slots[0], sequence, step, description.numpy().tobytes())


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
