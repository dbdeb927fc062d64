"""Copies that a rank makes after its steps: what they hold, how many steps share one, and what they cost."""

import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from fastvit_engine.checkpoint import Checkpointer, DamagedCheckpoint, TrainerState, store_of
from fastvit_engine.checkpoint.in_memory import Copies, Held, HeldCopies, can_hold, held_copies
from fastvit_engine.checkpoint.in_memory.area import Area
from fastvit_engine.checkpoint.in_memory.contents import Described
from fastvit_engine.checkpoint.in_memory.neighbour import Neighbour
from fastvit_engine.config import CheckpointConfig
from fastvit_engine.distributed.world import World
from fastvit_engine.engine.ema import WeightAverage
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.start import Start, load_start
from tests.fastvit_engine.plain_engine import PlainEngine

pytestmark = pytest.mark.skipif(not can_hold(), reason="needs Linux's memfd_create")
STATE = TrainerState(step=0, fingerprint={"model": {"name": "Ti/4"}}, recent=((2.5, 1.0),), consumed=8)


@pytest.fixture(scope="module")
def world():
    patch = pytest.MonkeyPatch()
    patch.setenv("LOCAL_RANK", "0")
    patch.delenv("LOCAL_WORLD_SIZE", raising=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(rank=0, size=1, device=torch.device("cpu"))
    dist.destroy_process_group()
    patch.undo()


class Training:
    """A small model that trains, whose state is copied after each step."""

    def __init__(self, areas, world, folder):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
        self.model.register_buffer("seen", torch.tensor([1, 2**40]))
        self.engine = PlainEngine(self.model, torch.optim.AdamW(self.model.parameters()))
        self.ema = WeightAverage(self.engine, 0.9)
        run, settings = RunFolder(folder), CheckpointConfig()
        self.checkpointer = Checkpointer(run, store_of(settings, run), self.engine, self.ema, world, settings)
        self.held, self.done = HeldCopies(Held(areas), world, open_messages=None), 0
        self.copies = Copies(self.held, self.checkpointer)
        self.copies.continue_from(None)

    def step(self):
        self.engine.backward(self.model(torch.randn(4, 5)).square().mean())
        self.copies.before_update(self.done + 1)
        self.engine.step()
        self.ema.update(10)
        self.model.seen += 1
        self.done += 1
        self.copies.after_step(self.done, lambda: replace(STATE, step=self.done), lambda: {"counted": self.done})

    def everything(self):
        slices = self.checkpointer.slices_to_write()
        return {(kind, part.name): part.values.clone() for kind, of_kind in slices.items() for part in of_kind}


@pytest.fixture
def training(tmp_path, world):
    with held_copies(1) as holder:
        yield Training(holder.areas, world, tmp_path)


def newest(training):
    training.copies.close()  # until it is there
    return training.held.newest()


def test_a_copy_restores_what_was_there_after_its_step(training):
    for _ in range(3):
        training.step()
    copy, there, scalars = newest(training), training.everything(), training.engine.scalars()
    for of_kind in training.checkpointer.slices_to_write().values():
        for part in of_kind:
            part.values.zero_()
    assert training.checkpointer.load(copy) == replace(STATE, step=3)
    assert training.engine.scalars() == scalars
    here = training.everything()
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in there)
    training.copies.continue_from(copy)
    assert training.copies.unsettled == {"counted": 3}


def test_every_step_has_its_copy_before_the_next_update(training):
    for step in range(1, 6):
        training.step()
        assert newest(training).step == step


def test_weights_change_only_when_they_are_copied(training, monkeypatch):
    order = []
    commit, update = Area.commit, training.engine.step

    def slow_commit(area, slot, sequence, step, description):
        time.sleep(0.05)
        commit(area, slot, sequence, step, description)
        order.append(f"copy of {step}")

    monkeypatch.setattr(Area, "commit", slow_commit)
    monkeypatch.setattr(training.engine, "step", lambda: (order.append(f"update {training.done + 1}"), update()))
    for _ in range(3):
        training.step()
    training.copies.close()
    assert order == ["update 1", "copy of 1", "update 2", "copy of 2", "update 3", "copy of 3"]


class SlowNeighbour:
    """Takes a copy in when it is waited for."""

    processor_seconds = seconds = 0.0

    def __init__(self):
        self.order, self.on_the_way = [], None

    def begin(self, slot, size, sequence, step, description):
        self.order.append(f"copy of {step}" + (" too early" if self.on_the_way else ""))
        self.on_the_way = step

    def wait(self):
        if self.on_the_way:
            self.order.append(f"taken in {self.on_the_way}")
        self.on_the_way = None


def test_a_copy_begins_only_when_the_next_node_has_the_one_before(training):
    neighbour = training.copies._neighbour = SlowNeighbour()
    for _ in range(3):
        training.step()
    training.copies.close()
    assert neighbour.order == ["copy of 1", "taken in 1", "copy of 2", "taken in 2", "copy of 3", "taken in 3"]


def test_an_exchange_that_fails_ends_the_step_that_waits_for_it(training):
    class NoConnection:
        def send(self, numbers, contents, to):
            raise RuntimeError("connection closed by peer")

    own, guest = training.held.own, training.held.own
    training.copies._neighbour = Neighbour(own, guest, NoConnection(), training.held.world)
    training.step()
    with pytest.raises(RuntimeError, match="closed by peer"):
        training.step()
    assert training.done == 1


def test_loading_leaves_nothing_of_the_old_state_in_memory(training):
    training.step()
    assert training.copies._contents is not None
    training.copies.forget()
    assert training.copies._contents is None


def test_slices_and_manifest_are_made_again_only_when_the_state_lies_elsewhere(training, monkeypatch):
    made = []
    for name in ("slices_to_write", "manifest"):
        method = getattr(Checkpointer, name)
        monkeypatch.setattr(Checkpointer, name, lambda *args, m=method, n=name: made.append(n) or m(*args))
    for _ in range(4):
        training.step()
    assert made == ["slices_to_write", "manifest"]
    training.model.seen = training.model.seen.clone()
    training.step()
    assert made == 2 * ["slices_to_write", "manifest"]
    there = training.everything()
    training.checkpointer.load(newest(training))  # gives the optimizer new tensors
    training.step()
    assert made.count("manifest") == 3
    assert not torch.equal(training.everything()["weight", "0.weight"], there["weight", "0.weight"])
    training.checkpointer.load(newest(training))
    assert training.model.seen.tolist() == [1 + 6, 2**40 + 6]


def test_state_that_comes_later_is_in_the_next_copy(training):
    """An optimizer has no moments of a parameter that has had no gradient."""
    training.model[0].requires_grad_(False)
    training.step()
    assert "1.weight" in newest(training).read_manifest().stored("exp_avg")
    assert "0.weight" not in newest(training).read_manifest().stored("exp_avg")
    training.model[0].requires_grad_(True)
    training.step()
    assert "0.weight" in newest(training).read_manifest().stored("exp_avg")


def test_steps_share_a_copy_only_if_one_each_would_cost_too_much(training):
    training.step()
    training.copies.settle(step_seconds=1e6)
    training.step()
    assert newest(training).step == 2
    training.copies.settle(step_seconds=1e-9)
    training.step()
    training.step()
    assert newest(training).step == 3  # which was due already


def test_a_copy_that_cannot_be_read_gives_way_to_the_newest_checkpoint_on_the_disk(training, world, capsys):
    training.step()
    training.step()
    training.checkpointer.save(replace(STATE, step=2))
    saved, copy = training.checkpointer.settle(wait=True), newest(training)
    there = training.everything()

    def lose_its_way(checkpoint, ranges):
        if checkpoint is copy:
            raise DamagedCheckpoint("a copy in memory was altered")

    training.checkpointer.before_reading = lose_its_way
    start = Start(replace(STATE, step=2), 9, copy, "", None, saves_first=True)
    found = load_start(start, training.checkpointer, training.checkpointer.run, world)
    assert (found.checkpoint, found.step, found.saves_first) == (saved, 2, False)
    assert all(torch.equal(values, there[key]) for key, values in training.everything().items())
    assert f"a copy in memory was altered: going back to {saved}" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\n", b"null\n{}", b'{"state": 1, "scalars": {}, "unsettled": {}}\n{}'])
def test_a_description_of_another_form_is_damage(content):
    with pytest.raises(DamagedCheckpoint, match="memory, step-7"):
        Described.read(content, "memory, step-7")
