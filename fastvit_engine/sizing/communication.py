"""How long a collective operation takes: latency times the number of messages that wait for each other, plus bytes.

A model, which knows nothing of congestion, of the routes of messages, or of what else uses the network.

NCCL. A ring through all W processes moves (W - 1) / W of the bytes past each of them, twice for an all-reduce, in W - 1
or 2 (W - 1) hops. A ring enters and leaves a node once for each of its adapters, so hops between nodes are few. An
all-reduce may follow trees instead: bytes as in the ring, but hops by the logarithm of the number of nodes; NCCL takes
whichever is faster.

Gloo. A ring whose processes have two segments in flight. A segment is sent when its receiver has said that it is ready:
one latency for the notice, one for the segment. Notices travel in the same queue as segments: the next one leaves when
the other segment in flight has. An all-reduce has segments of 1 MiB at the most, and at least two for each process; a
gather has two, and sends before it says that it is ready: a process that calls a latency later than its neighbour gives
its notice behind its own first segment. One is taken to, since an all-reduce of one number ends a latency later for
each next process. That is a single segment, which all but its first receiver are ready for when it comes. Of three
processes, the last to have the sum is the first to receive the next one.
`reduce_scatter` is an all-reduce of which a process keeps its part (PyTorch 2.13).
"""

import math
from dataclasses import dataclass
from typing import Literal

from fastvit_engine.sizing.interconnects import Interconnect, Link
from fastvit_engine.sizing.traffic import SCALAR, Message

Library = Literal["nccl", "gloo"]
_SEGMENT = 2**20  # bytes, at the most, that Gloo reduces at a time


@dataclass(frozen=True)
class Network:
    """The processes of a job, and what they send their messages over."""

    processes: int
    per_node: int
    interconnect: Interconnect
    library: Library

    @property
    def nodes(self) -> int:
        return -(-self.processes // self.per_node)

    @property
    def at_once(self) -> int:
        """Messages that are on their way at a time: Gloo has two threads, NCCL one stream for all of ZeRO's."""
        return 2 if self.library == "gloo" else 1

    def seconds(self, message: Message) -> float:
        """Of one collective operation, from the call to its end, if no process waits long for another's call."""
        processes = min(self.processes, self.per_node) if message.within_node else self.processes
        if processes == 1:
            return 0.0
        bandwidth = self.interconnect.ring_bandwidth(processes, self.per_node)
        if self.library == "gloo":
            return _gloo(message, processes, Link(bandwidth, self._latency(processes)))
        return self._nccl(message, processes, bandwidth)

    def moving_seconds(self, message: Message) -> float:
        """Of these, what its bytes take."""
        processes = min(self.processes, self.per_node) if message.within_node else self.processes
        return self.wire_bytes(message) / self.interconnect.ring_bandwidth(processes, self.per_node)

    def wire_bytes(self, message: Message) -> float:
        """That each process sends for it."""
        processes = min(self.processes, self.per_node) if message.within_node else self.processes
        twice = message.kind == "all_reduce" or (self.library == "gloo" and message.kind == "reduce_scatter")
        return (2 if twice else 1) * message.bytes * (processes - 1) / processes

    def _latency(self, processes: int) -> float:
        """Of a hop of the ring: the slowest, since all processes wait for each other."""
        within, between = self.interconnect.within.latency, self.interconnect.between.latency
        if processes <= self.per_node:
            return within
        return between if self.per_node == 1 else max(within, between)

    def _nccl(self, message: Message, processes: int, bandwidth: float) -> float:
        within, between = self.interconnect.within.latency, self.interconnect.between.latency
        nodes = -(-processes // self.per_node)
        per_node = min(processes, self.per_node)
        ring = (processes - nodes) * within + (nodes - 1) * between
        moved = self.wire_bytes(message) / bandwidth
        if message.kind != "all_reduce":
            return ring + moved
        tree = (per_node - 1) * within + math.ceil(math.log2(nodes)) * between
        return 2 * min(ring, tree) + moved


def _gloo(message: Message, processes: int, link: Link) -> float:
    part = message.bytes / processes
    if message.kind == "all_gather":
        return _segments(processes - 1, 2, part / 2, link) + part / 2 / link.bandwidth
    if message.bytes <= SCALAR:
        return (5 if processes == 3 else 2 * (processes - 1)) * link.latency
    each = max(2, math.ceil(message.bytes / _SEGMENT / processes))
    return 2 * _segments(processes - 1, each, part / each, link)


def _segments(hops: int, each: int, size: float, link: Link) -> float:
    """`hops` parts of `each` segments of `size` bytes, two segments in flight."""
    moving, latency = size / link.bandwidth, link.latency
    pairs = hops * each / 2
    return (pairs - 1) * max(latency + 2 * moving, 2 * latency + moving) + 2 * latency + 2 * moving
