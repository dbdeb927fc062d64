"""Whole matrices out of the parts that processes hold of them: who works on which, and who sends what to whom."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """Elements [start, start + rows * columns) of a flattened parameter: one matrix."""

    name: str
    start: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + count) of a matrix, which begin at element `offset` of a span."""

    matrix: int
    start: int
    count: int
    span: int
    offset: int


@dataclass(frozen=True)
class Exchange:
    """How one process gets the matrices that it owns, and everyone their parts of what becomes of them."""

    owned: list[int]  # the matrices that this process works on
    own: list[Fragment]  # what this process holds
    lent: list[list[int]]  # for each process, which of `own` it is sent
    collected: list[list[Fragment]]  # what this process gets from each
    returned: list[list[Fragment]]  # what this process sends back to each
    received: list[list[int]]  # for each process, which of `own` come back from it


Spans = Sequence[tuple[str, int, int]]  # parameter, first element, number of elements


def plan_exchange(matrices: Sequence[Matrix], spans: Sequence[Spans], rank: int, *, replicated: bool) -> Exchange:
    """What process `rank` does. spans: what each process holds.

    replicated: each process holds everything, so that there is nothing to collect; the results go to all.
    """
    processes = len(spans)
    owners = owners_of(matrices, processes)
    own = fragments_of(matrices, spans[rank])
    fragments = [own] * processes if replicated else [fragments_of(matrices, held) for held in spans]

    def shared(process: int, owner: int) -> bool:
        return not replicated or process == owner

    return Exchange(
        owned=[number for number, owner in enumerate(owners) if owner == rank],
        own=own,
        lent=[
            [i for i, f in enumerate(own) if owners[f.matrix] == owner and shared(rank, owner)]
            for owner in range(processes)
        ],
        collected=[
            [f for f in fragments[process] if owners[f.matrix] == rank and shared(process, rank)]
            for process in range(processes)
        ],
        returned=[[f for f in fragments[process] if owners[f.matrix] == rank] for process in range(processes)],
        received=[[i for i, f in enumerate(own) if owners[f.matrix] == owner] for owner in range(processes)],
    )


def owners_of(matrices: Sequence[Matrix], processes: int) -> list[int]:
    """The process that works on each matrix: the most work first, each to the process with the least so far."""
    work = [matrix.size * min(matrix.rows, matrix.columns) for matrix in matrices]
    loads, owners = [0] * processes, [0] * len(matrices)
    for number in sorted(range(len(matrices)), key=lambda number: -work[number]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += work[number]
    return owners


def fragments_of(matrices: Sequence[Matrix], spans: Spans) -> list[Fragment]:
    """What lies in the spans of the matrices."""
    numbers: dict[str, list[int]] = {}
    for number, matrix in enumerate(matrices):
        numbers.setdefault(matrix.name, []).append(number)
    fragments = []
    for span, (name, start, count) in enumerate(spans):
        for number in numbers.get(name, ()):
            matrix = matrices[number]
            first, last = max(start, matrix.start), min(start + count, matrix.stop)
            if first < last:
                fragments.append(Fragment(number, first - matrix.start, last - first, span, first - start))
    return fragments


def send(
    outgoing: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> list[list[Tensor]]:
    """Sends each process its 1-D tensors; returns those from each, whose sizes are given. Collective."""
    if len(outgoing) == 1:
        return [list(outgoing[0])]
    nothing = torch.empty(0, dtype=dtype, device=device)
    sent = torch.cat([nothing, *(tensor for of_process in outgoing for tensor in of_process)])
    received = sent.new_empty(sum(map(sum, sizes)))
    torch.distributed.all_to_all_single(  # as bytes, which every backend knows
        received.view(torch.uint8),
        sent.view(torch.uint8),
        [dtype.itemsize * sum(of_process) for of_process in sizes],
        [dtype.itemsize * sum(tensor.numel() for tensor in of_process) for of_process in outgoing],
    )
    parts = iter(received.split([size for of_process in sizes for size in of_process]))
    return [[next(parts) for _ in of_process] for of_process in sizes]
