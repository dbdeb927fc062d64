"""Copies of several nodes, whose ranks are threads here: what they exchange, what survives a node, what is read."""

import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fastvit_engine.checkpoint import DamagedCheckpoint, Manifest, TrainerState
from fastvit_engine.checkpoint.format import StoredFile, StoredTensor
from fastvit_engine.checkpoint.in_memory import Held, HeldCopies, Holder, Messages, can_hold
from fastvit_engine.checkpoint.in_memory.contents import Contents, Label
from fastvit_engine.checkpoint.in_memory.neighbour import Neighbour
from fastvit_engine.checkpoint.writer import file_name
from fastvit_engine.errors import UserError

pytestmark = pytest.mark.skipif(not can_hold(), reason="needs Linux's memfd_create")
PER_NODE, NUMBERS = 2, 1000  # each rank has so many int32 numbers of a parameter


class Gathering:
    """`World.gather` between threads."""

    def __init__(self, size):
        self.values, self.barrier = [None] * size, threading.Barrier(size)

    def __call__(self, rank, value):
        self.values[rank] = value
        self.barrier.wait(30)
        gathered = list(self.values)
        self.barrier.wait(30)
        return gathered


class ThreadWorld:
    def __init__(self, rank, size, gathering):
        self.rank, self.size, self.is_main, self._gathering = rank, size, rank == 0, gathering
        first = rank // PER_NODE * PER_NODE
        self.node_ranks = range(first, first + PER_NODE)

    def gather(self, value):
        return self._gathering(self.rank, value)


class Nodes:
    """Nodes of two ranks each. A node that is lost comes back with nothing in its memory."""

    def __init__(self, count, stack):
        self.count, self.size, self.stack = count, count * PER_NODE, stack
        self.holders = [self._empty() for _ in range(count)]

    def _empty(self):
        holder = Holder(PER_NODE, guests=True)
        self.stack.callback(holder.close)
        return holder

    def lose(self, node):
        self.holders[node] = self._empty()

    def run(self, function, size=None):
        """What `function(held)` returns on each rank."""
        size = size or self.size
        store, gathering = dist.HashStore(), Gathering(size)

        def rank_of(rank):
            def connect():
                return Messages(dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=30)))

            holder = self.holders[rank // PER_NODE]
            areas = Held(holder.areas, holder.guests)
            return function(HeldCopies(areas, ThreadWorld(rank, size, gathering), connect))

        with ThreadPoolExecutor(size) as threads:
            return [future.result(60) for future in [threads.submit(rank_of, rank) for rank in range(size)]]

    def copy(self, sequence, start="first", reach=True):
        """All ranks copy a state after `sequence` steps, and exchange it."""

        def one(held):
            rank, world = held.world.rank, held.world
            values = numbers(rank, sequence)
            tensor = StoredTensor("I32", rank * NUMBERS, NUMBERS, 0, 0)
            file = StoredFile(values.nbytes, [("weight", "w", tensor)])
            state = TrainerState(step=sequence, fingerprint={"model": {}})
            manifest = Manifest(state, {}, {"w": [world.size * NUMBERS]}, {file_name(rank): file})
            contents = Contents([], [], values.nbytes, manifest.to_json())
            description = contents.describe(Label(start, world.size, rank), state, {}, {"counted": rank})
            slot = held.own.begin(values.nbytes, len(description))
            held.own.memory(slot)[: values.nbytes] = values.numpy().tobytes()
            held.own.commit(slot, sequence, sequence, description)
            if reach:
                neighbour = Neighbour(held.own, held.guest, held.messages, world)
                neighbour.begin(slot, values.nbytes, sequence, sequence, description)
                neighbour.wait()

        self.run(one)

    def newest(self, size=None):
        """The step of the newest state, alike on all ranks; None if there is none."""
        (step,) = {found and found.step for found in self.run(lambda held: held.newest(), size)}
        return step

    def read(self):
        """What each rank reads of the newest state, which is all of it."""

        def one(held):
            found = held.newest()
            manifest = found.read_manifest()
            held.fetch(found.store, {file: (0, stored.size) for file, stored in manifest.files.items()})
            mapped = [found.store.map(found.name, file, s.size, 0, s.size) for file, s in manifest.files.items()]
            return torch.cat([torch.frombuffer(m, dtype=torch.int32, count=NUMBERS) for m in mapped])

        return self.run(one)


def numbers(rank, step):
    return torch.arange(NUMBERS, dtype=torch.int32) + 10_000 * rank + 1_000_000 * step


def everything(nodes, step):
    return torch.cat([numbers(rank, step) for rank in range(nodes.size)])


@pytest.fixture
def nodes():
    with ExitStack() as stack:
        yield lambda count: Nodes(count, stack)


@pytest.mark.parametrize("count", [2, 3])
def test_each_node_has_the_copies_of_the_node_before_it(nodes, count):
    nodes = nodes(count)
    nodes.copy(1)
    for node, holder in enumerate(nodes.holders):
        before = nodes.holders[node - 1]
        for own, guest in zip(before.areas, holder.guests, strict=True):
            assert own.copies()[1].description == guest.copies()[1].description
            held = [bytes(area.map(area.copies()[1].start, 4 * NUMBERS)) for area in (own, guest)]
            assert held[0] == held[1]


@pytest.mark.parametrize(("count", "lost"), [(2, 0), (2, 1), (3, 1), (4, 2)])
def test_all_ranks_read_the_newest_state_after_a_node_is_lost(nodes, count, lost):
    nodes = nodes(count)
    nodes.copy(1)
    nodes.copy(2)
    nodes.lose(lost)
    assert nodes.newest() == 2
    for found in nodes.read():
        assert torch.equal(found, everything(nodes, 2))


def test_what_had_not_reached_the_next_node_is_lost_with_its_own(nodes):
    nodes = nodes(3)
    nodes.copy(1)
    nodes.copy(2, reach=False)
    assert nodes.newest() == 2
    nodes.lose(1)
    assert nodes.newest() == 1
    assert all(torch.equal(found, everything(nodes, 1)) for found in nodes.read())


def test_after_two_neighbours_are_lost_the_run_continues_from_the_disk_and_says_so(nodes, capsys):
    nodes = nodes(4)
    nodes.copy(1)
    nodes.lose(1)
    nodes.lose(2)
    assert nodes.newest() is None
    assert capsys.readouterr().out == (
        "the copies in memory are not the whole state of 8 processes: continuing from the disk\n"
    )


def test_nodes_that_are_not_neighbours_may_be_lost_together(nodes):
    nodes = nodes(4)
    nodes.copy(1)
    nodes.lose(1)
    nodes.lose(3)
    assert all(torch.equal(found, everything(nodes, 1)) for found in nodes.read())


def test_nodes_may_come_back_in_another_order(nodes):
    nodes = nodes(3)
    nodes.copy(1)
    nodes.holders = [nodes.holders[2], nodes.holders[0], nodes.holders[1]]
    assert all(torch.equal(found, everything(nodes, 1)) for found in nodes.read())


def test_a_smaller_job_does_not_use_the_copies_of_a_larger_one(nodes, capsys):
    nodes = nodes(3)
    nodes.copy(1)
    assert nodes.newest(size=4) is None
    assert "not the whole state of 4 processes: continuing from the disk" in capsys.readouterr().out


def test_copies_of_two_starts_are_never_one_state(nodes):
    nodes = nodes(2)
    nodes.copy(1, start="first")
    kept = nodes.holders[1]
    nodes.lose(0)
    nodes.lose(1)
    nodes.copy(1, start="second", reach=False)
    nodes.holders[1] = kept  # cut off for long, and back: it has copies of the same number from before
    kept.guests[0].keep_only(None)
    assert nodes.newest() is None


def test_nothing_is_said_before_there_are_copies(nodes, capsys):
    assert nodes(2).newest() is None
    assert capsys.readouterr().out == ""


def test_a_copy_that_is_altered_on_its_way_is_not_kept_and_not_read(nodes, monkeypatch, capsys):
    nodes = nodes(3)
    nodes.copy(1)

    def sending(self, numbers, contents, to):
        altered = [content.clone() for content in contents]
        header = [*numbers, *(zlib.crc32(content.numpy().data) for content in contents)]
        altered[0][7] ^= 1
        chunks = [torch.tensor(header, dtype=torch.int64), *altered]
        works = [(self._group.send([chunk], to, 0), chunk) for chunk in chunks]
        return lambda: [work.wait() for work, _ in works]

    monkeypatch.setattr(Messages, "send", sending)
    with pytest.raises(DamagedCheckpoint, match="altered on its way from rank"):
        nodes.lose(1)
        nodes.read()
    nodes.copy(2)
    assert capsys.readouterr().err.count("altered on its way") == nodes.size
    assert all(1 in area.copies() and 2 not in area.copies() for area in nodes.holders[2].guests)


def test_nodes_without_the_same_launcher_are_refused(nodes):
    nodes = nodes(2)
    nodes.holders[1].areas, nodes.holders[1].guests = [], []
    with pytest.raises(UserError, match="keep copies of 0 of 2 processes and 2 of 2 processes: set"):
        nodes.newest()
