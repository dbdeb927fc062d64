"""Saving and loading in one process, with a plain engine in place of DeepSpeed."""

import errno
import json
import os
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fastvit_engine.checkpoint import (
    Checkpoint,
    Checkpointer,
    DamagedCheckpoint,
    Recovery,
    TrainerState,
    doubt_about_latest,
    local,
    open_store,
    usable_checkpoints,
)
from fastvit_engine.checkpoint.export import export_run, export_weights, find_checkpoint
from fastvit_engine.checkpoint.format import Block, Manifest
from fastvit_engine.checkpoint.local import LocalStore
from fastvit_engine.checkpoint.retention import stale_checkpoints
from fastvit_engine.checkpoint.store import step_name
from fastvit_engine.checkpoint.writer import HostCopy, SaveInFlight
from fastvit_engine.config import CheckpointConfig
from fastvit_engine.distributed.world import World
from fastvit_engine.engine.ema import WeightAverage
from fastvit_engine.engine.protocol import ParameterSlice, share
from fastvit_engine.errors import RestartError, UserError
from fastvit_engine.observe import disk
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.start import Start, load_start
from tests.fastvit_engine.plain_engine import PlainEngine

STATE = TrainerState(
    step=3,
    fingerprint={"model": {"name": "Ti/4"}},
    seconds=1.0,
    consumed=8,
    bad_samples=2,
    recent=((2.5, 1.0), (2.25, 0.5)),
    accuracy={"eval": {"top1": 0.5, "top5": None, "loss": 1.5, "samples": 4}},
    evaluated_at=2,
    recovery=Recovery(skipped=((8, 16),), failed=((8, 16), (24, 32)), rewinds=2),
    pixels={"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
)


@pytest.fixture(scope="module")
def world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(rank=0, size=1, device=torch.device("cpu"))
    dist.destroy_process_group()


class GatedStore(LocalStore):
    """A folder whose writes wait for the gate, and fail as told."""

    def __init__(self, folder):
        super().__init__(folder)
        self.gate, self.error = threading.Event(), None
        self.gate.set()

    def write(self, name, file, chunks):
        assert self.gate.wait(30)
        if self.error is not None:
            (self.folder / f"{name}.partial" / file).write_bytes(b"half a file")
            raise self.error
        super().write(name, file, chunks)


class Training:
    """A small model that trains, and a Checkpointer of it."""

    def __init__(self, folder, world, seed=0, ema=True, store=None, width=7, **settings):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(5, width), torch.nn.Linear(width, 3))
        self.model.register_buffer("seen", torch.tensor([seed, 2**40 + seed]))  # no float holds it exactly
        self.engine = PlainEngine(self.model, torch.optim.AdamW(self.model.parameters()))
        self.ema = WeightAverage(self.engine, 0.9) if ema else None
        self.run, self.store = RunFolder(folder), store or GatedStore(folder / "checkpoints")
        self.said = []  # but for what was saved
        checks = CheckpointConfig(**settings)
        self.checkpointer = Checkpointer(self.run, self.store, self.engine, self.ema, world, checks, say=self.hear)

    def hear(self, text):
        if not text.startswith("saved "):
            self.said.append(text)

    def train(self, steps=1):
        for _ in range(steps):
            self.engine.backward(self.model(torch.randn(4, 5)).square().mean())
            self.checkpointer.before_update()
            self.engine.step()
            if self.ema:
                self.ema.update(10)

    def save(self, step, **state):
        self.checkpointer.save(replace(STATE, step=step, **state))
        return self.checkpointer.settle(wait=True)

    def everything(self):
        """A copy of all that a checkpoint is to hold."""
        engine = self.engine
        slices = {"weight": engine.master_weights(), **engine.optimizer_state(), "buffer": engine.buffers()}
        if self.ema:
            slices["ema"] = self.ema.slices()
        tensors = {(kind, part.name): part.values.clone() for kind, of_kind in slices.items() for part in of_kind}
        return tensors, engine.scalars()


def assert_same(one, other):
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    for key, values in one[0].items():
        assert torch.equal(values, other[0][key]), key


@pytest.fixture
def training(tmp_path, world):
    training = Training(tmp_path / "run", world)
    training.train(3)
    return training


def checkpoints(training):
    return sorted(path.name for path in training.store.folder.iterdir())


def test_all_comes_back_in_another_process_and_in_this_one(training, tmp_path, world):
    saved, expected = training.save(3), training.everything()
    assert {kind for kind, _ in expected[0]} == {"weight", "ema", "exp_avg", "exp_avg_sq", "buffer"}
    assert expected[1] == {"optimizer.step": 3.0}
    other = Training(tmp_path / "run", world, seed=1)
    assert other.checkpointer.load(saved) == STATE
    assert_same(other.everything(), expected)
    training.train(2)
    training.checkpointer.load(saved)
    assert_same(training.everything(), expected)
    for model in (training, other):  # and they go on alike
        torch.manual_seed(5)
        model.train(2)
    assert_same(training.everything(), other.everything())


def test_the_engine_publishes_what_was_loaded_and_counts_from_there(training, monkeypatch):
    saved, expected = training.save(3), training.everything()
    training.train(2)
    told = []
    monkeypatch.setattr(training.engine, "publish", lambda: told.append(("publish", training.everything())))
    monkeypatch.setattr(training.engine, "reset_progress", lambda step: told.append(("reset", step)))
    training.checkpointer.load(saved)
    (publish, published), reset = told
    assert publish == "publish" and reset == ("reset", 3)
    assert_same(published, expected)


@pytest.mark.parametrize("place", [0, 1, 31, 64, 100, 139])
def test_every_byte_of_a_parameter_is_covered_by_its_checksum(training, place):
    saved = training.save(3)
    stored = saved.read_manifest().files["rank-00000.safetensors"]
    (tensor,) = [tensor for kind, name, tensor in stored.tensors if (kind, name) == ("weight", "0.weight")]
    assert tensor.nbytes == 7 * 5 * 4
    path = training.store.folder / saved.name / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[tensor.offset + place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"does not hold the bytes of parameter '0\.weight' \(weight\)"):
        training.checkpointer.load(saved)


def test_a_checkpoint_before_the_first_step_leaves_no_moments(tmp_path, world):
    training = Training(tmp_path / "run", world)
    saved, expected = training.save(0), training.everything()
    training.train(2)
    training.checkpointer.load(saved)
    assert_same(training.everything(), expected)
    assert not training.engine.optimizer_state()


def test_training_goes_on_while_the_checkpoint_is_written(training):
    expected = training.everything()
    training.store.gate.clear()
    training.checkpointer.save(STATE)
    assert training.checkpointer.settle() is None  # not yet
    training.train(2)  # changes what is being saved
    assert checkpoints(training) == ["step-00000003.partial"]
    training.store.gate.set()
    saved = training.checkpointer.settle(wait=True)
    assert str(saved).endswith("step-00000003")
    training.checkpointer.load(saved)
    assert_same(training.everything(), expected)
    (event,) = read_events(training.run)
    assert (event["event"], event["step"], event["path"]) == ("checkpoint", 3, str(saved))
    assert event["bytes"] == sum(p.stat().st_size for p in (training.store.folder / saved.name).glob("*.safetensors"))


def test_an_update_waits_until_all_is_copied_and_a_forward_pass_does_not(training, monkeypatch):
    may_copy, copy = threading.Event(), HostCopy._copy

    def later(self, *what):
        assert may_copy.wait(30)
        copy(self, *what)

    monkeypatch.setattr(HostCopy, "_copy", later)
    expected = training.everything()
    training.checkpointer.save(STATE)
    training.model.seen.add_(1)  # as a forward pass may
    update = threading.Thread(target=training.train)
    update.start()
    update.join(0.2)
    assert update.is_alive()
    may_copy.set()
    update.join(30)
    assert not torch.equal(training.everything()[0]["weight", "0.weight"], expected[0]["weight", "0.weight"])
    training.checkpointer.load(training.checkpointer.settle(wait=True))
    assert_same(training.everything(), expected)


def test_a_copy_that_fails_is_a_save_that_fails(training, monkeypatch):
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: 1 / 0)  # which the thread that copies asks for first
    training.checkpointer.save(STATE)
    training.train()
    assert training.checkpointer.settle(wait=True) is None
    assert "division by zero on rank 0" in training.said[0]
    assert checkpoints(training) == []


def test_the_second_of_two_quick_saves_waits_and_says_so(training):
    training.store.gate.clear()
    training.checkpointer.save(STATE)
    threading.Timer(0.2, training.store.gate.set).start()
    training.checkpointer.save(replace(STATE, step=4))
    assert training.said == [f"step 4: waiting until {training.store.describe('step-00000003')} is written"]
    assert training.checkpointer.close().name == "step-00000004"
    assert [event["event"] for event in read_events(training.run)] == ["checkpoint", "checkpoint"]
    assert checkpoints(training) == ["latest", "step-00000003", "step-00000004"]


def test_files_are_plain_safetensors(training):
    saved = training.save(3)
    folder = training.store.folder / saved.name
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    tensors = load_file(folder / "rank-00000.safetensors")
    assert torch.equal(tensors["weight/0.weight@0"], training.model[0].weight.detach().flatten())
    assert tensors["buffer/seen@0"].tolist() == training.model.seen.tolist()


def test_a_failed_save_is_an_event_and_the_third_in_a_row_an_error(training):
    good = training.save(1)
    training.store.error = OSError(errno.EIO, "the disk has a hole")
    assert training.save(2) is None
    assert training.save(3) is None
    message = f"checkpoint {training.store.describe('step-00000002')} could not be written"
    assert training.said[0].startswith(message) and "the disk has a hole on rank 0" in training.said[0]
    training.store.error = None
    training.save(4)  # which makes the next failure the first again
    training.store.error = OSError(errno.EIO, "the disk has a hole")
    for step in (5, 6):
        training.save(step)
    with pytest.raises(RestartError, match=r"step-00000007.*previous checkpoint is intact; make room"):
        training.save(7)
    kinds = [event["event"] for event in read_events(training.run)]
    assert kinds == ["checkpoint", *["checkpoint_failed"] * 2, "checkpoint", *["checkpoint_failed"] * 3]
    assert checkpoints(training) == ["latest", good.name, "step-00000004"]
    assert [c.name for c in usable_checkpoints(training.store)] == ["step-00000004", good.name]


@pytest.mark.parametrize("moment", ["before it is prepared", "before it is published"])
def test_a_run_that_is_not_its_own_any_more_writes_no_checkpoint(training, moment):
    good, asked = training.save(1), []

    def check():
        asked.append(checkpoints(training))
        if len(asked) > (moment == "before it is published"):
            raise UserError("it belongs to another run")

    training.checkpointer.check_owner = check
    with pytest.raises(UserError, match="^it belongs to another run$"):
        training.save(2)
    assert training.store.latest() == good.name
    left = ["step-00000002.partial"] if moment == "before it is published" else []  # which is the other run's to remove
    assert checkpoints(training) == ["latest", good.name, *left]
    assert [event["event"] for event in read_events(training.run)] == ["checkpoint"]


@pytest.mark.parametrize("cause", ["write", "room"])
def test_the_save_at_the_end_of_a_run_is_tried_again_until_patience_ends(training, cause, monkeypatch):
    monkeypatch.setattr(disk, "PATIENCE_SECONDS", 0.5)
    if cause == "write":
        training.store.error = OSError(errno.ENOSPC, "No space left on device")
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=66_000))
    training.checkpointer.save(STATE)
    with pytest.raises(RestartError, match="step-00000003 could not be written .*make room and run the same command"):
        training.checkpointer.close()
    assert checkpoints(training) == []
    assert len(training.said) == 1  # however often it was tried


def test_a_checkpoint_is_published_only_after_the_records_up_to_it(training):
    """A resume finds them where it finds the checkpoint; while they cannot be uploaded, the previous one counts."""
    seen = []
    training.checkpointer.upload_records = lambda: seen.append(checkpoints(training))
    assert training.save(3) is not None and seen == [["step-00000003.partial"]]

    def refuse():
        raise OSError(errno.ETIMEDOUT, "no answer")

    training.checkpointer.upload_records = refuse
    assert training.save(4) is None
    assert checkpoints(training) == ["latest", "step-00000003"] and "no answer" in training.said[-1]
    training.checkpointer.upload_records = lambda: None
    assert training.save(5) is not None


def test_the_save_at_the_end_of_a_run_waits_for_room(training, tmp_path, world):
    expected = training.everything()
    training.store.error = OSError(errno.ENOSPC, "No space left on device")
    training.checkpointer.save(STATE)
    threading.Timer(1.0, lambda: setattr(training.store, "error", None)).start()
    saved = training.checkpointer.close()
    assert (saved.name, checkpoints(training)) == ("step-00000003", ["latest", "step-00000003"])
    other = Training(tmp_path / "run", world, seed=1)
    assert other.checkpointer.load(saved) == STATE
    assert_same(other.everything(), expected)


def test_a_disk_that_cannot_be_read_for_now_asks_for_a_restart(training, monkeypatch):
    """Not for another checkpoint: this one may be whole."""
    saved = training.save(3)

    def lost(*arguments):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(training.store, "map", lost)
    with pytest.raises(RestartError, match=r"step-00000003 cannot be read \(.*Stale file handle\): check the disk"):
        training.checkpointer.load(saved)


def test_a_disk_without_room_is_noticed_before_it_is_filled(training, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=66_000))
    monkeypatch.setattr(training.store, "write", None)  # would fail if called
    assert training.save(3) is None
    assert "it takes 0.0 MB, and 0.1 MB are free on that disk" in training.said[0]


def test_the_rank_that_could_not_write_is_named(tmp_path):
    """Two ranks of one save, of which the second fails; only their threads are needed."""
    stores = [GatedStore(tmp_path), GatedStore(tmp_path)]
    stores[1].error = OSError(errno.EDQUOT, "Disk quota exceeded")
    stores[0].prepare("step-00000009", 0)
    reports, published = dist.HashStore(), []
    saves = []
    for rank, store in enumerate(stores):
        block = Block(f"weight/a@{rank}", "F32", memoryview(bytearray(4)))
        manifest = Manifest(replace(STATE, step=9), {}, {"a": [2]}, {})
        arguments = (manifest, [block], lambda: None, reports, rank, 2, published.append)
        saves.append(SaveInFlight(Checkpoint(store, "step-00000009"), *arguments))
    for save in saves:
        save.join()
    assert "Disk quota exceeded on rank 1" in saves[0].outcome.error
    assert published == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["while writing", "before the rename", "before latest"])
def test_killed_while_saving(training, tmp_path, world, monkeypatch, moment):
    """What lies on the disk then is copied aside, as a kill would have left it."""
    good, expected = training.save(1), training.everything()
    aside = tmp_path / "killed" / "checkpoints"

    def take(*arguments, **named):
        if not aside.exists():
            shutil.copytree(training.store.folder, aside)

    real = os.replace
    if moment == "while writing":
        monkeypatch.setattr(LocalStore, "write", take)
    else:
        target = "latest" if moment == "before latest" else "step-00000002"
        monkeypatch.setattr(os, "replace", lambda a, b: (take() if str(b).endswith(target) else None, real(a, b))[1])
    training.train()
    newer = training.save(2)
    assert aside.exists()
    other = Training(tmp_path / "killed", world, seed=1)
    usable = usable_checkpoints(other.store)
    if moment == "before latest":  # the checkpoint is whole
        assert [checkpoint.name for checkpoint in usable] == [newer.name, good.name]
        assert other.store.latest() == good.name
        expected = training.everything()
    else:
        assert [checkpoint.name for checkpoint in usable] == [good.name]
    other.checkpointer.load(usable[0])
    assert_same(other.everything(), expected)
    assert not [name for name in checkpoints(other) if name.endswith(("partial", "removed"))]
    monkeypatch.undo()
    assert other.save(2).name == "step-00000002"  # also over one that is there


@pytest.mark.parametrize("where", ["folder", "store"])
@pytest.mark.parametrize(
    ("latest", "doubt"),
    [
        (b"step-00000004", None),
        (b"step-00000004\n", None),
        (
            b"step-00000003",
            "latest names step-00000003, and STORE/step-00000004 is newer and complete: ",
        ),
        (None, "there is no STORE/latest: continuing from STORE/step-00000004, the newest checkpoint that is complete"),
        (b"", "latest is damaged: continuing from STORE/step-00000004, the newest checkpoint that is complete"),
        (bytes(13), "latest is damaged: "),
        (b"\xff\xfe\x00", "latest is damaged: "),
        (b"step-00000004" * 10**6, "latest is damaged: "),
        ("step-²".encode(), "latest is damaged: "),
        (b"../step-00000003", "latest is damaged: "),
        (b"step-00000003\nstep-00000004", "latest is damaged: "),
    ],
)
def test_the_newest_complete_checkpoint_is_used_whatever_latest_holds(tmp_path, latest, doubt, where, request):
    store = LocalStore(tmp_path) if where == "folder" else open_store(request.getfixturevalue("url"))
    for step in (3, 4):
        store.prepare(f"step-{step:08d}", 0)
        store.publish(f"step-{step:08d}", Manifest(replace(STATE, step=step), {}, {}, {}).to_json())
        store.point_latest(f"step-{step:08d}")
    if where == "folder":
        (tmp_path / "latest").unlink()
        (tmp_path / "step-²").mkdir()  # a digit, but no number
        (tmp_path / "step-²" / "manifest.json").touch()
        if latest is not None:
            (tmp_path / "latest").write_bytes(latest)
    else:
        bucket = request.getfixturevalue("s3_bucket")
        bucket.rm("bucket/run/latest")
        if latest is not None:
            bucket.pipe_file("bucket/run/latest", latest)
    assert [checkpoint.step for checkpoint in usable_checkpoints(store)] == [4, 3]
    said = doubt_about_latest(store)
    if doubt is None:
        assert said is None
    else:
        assert doubt.replace("STORE", store.describe("").rstrip("/")) in said and "\n" not in said


def test_a_damaged_latest_without_any_checkpoint_does_not_start_from_the_beginning(tmp_path):
    (tmp_path / "latest").write_bytes(bytes(13))
    with pytest.raises(UserError, match=r"latest names no checkpoint, and there is none that is complete: restore"):
        usable_checkpoints(LocalStore(tmp_path))
    (tmp_path / "latest").write_text("step-00000099")
    (missing,) = usable_checkpoints(LocalStore(tmp_path))
    with pytest.raises(DamagedCheckpoint, match="step-00000099 is not a complete checkpoint"):
        missing.read_manifest()
    (tmp_path / "latest").unlink()
    assert usable_checkpoints(LocalStore(tmp_path)) == []


def test_no_room_for_latest_leaves_a_checkpoint_to_resume_from(training, tmp_path, world, monkeypatch):
    """Inodes or bytes may run out between the rename and `latest`."""
    training.save(1)
    real = local.atomic_write

    def full(path, content):
        if path.name == "latest":
            raise OSError(28, "No space left on device", str(path))
        real(path, content)

    monkeypatch.setattr(local, "atomic_write", full)
    training.train()
    assert str(training.save(2)).endswith("step-00000002")  # which is no failed save
    assert [event["event"] for event in read_events(training.run)] == ["checkpoint", "checkpoint"]
    folder = training.store.folder
    assert training.said == [
        f"{folder}/latest could not be written (No space left on device): a resume finds {folder}/step-00000002 all "
        "the same"
    ]
    assert training.store.latest() == "step-00000001" and training.store.names()[-1] == "step-00000002"
    other = Training(tmp_path / "run", world, seed=1, store=LocalStore(training.store.folder))
    other.checkpointer.load(usable_checkpoints(other.store)[0])
    assert_same(other.everything(), training.everything())


def test_the_room_of_an_old_checkpoint_is_enough_for_latest(tmp_path, world, monkeypatch):
    training = Training(tmp_path / "run", world, keep=1)
    training.save(1)
    real = local.atomic_write

    def full(path, content):
        if path.name == "latest" and (training.store.folder / "step-00000001").exists():
            raise OSError(28, "No space left on device", str(path))
        real(path, content)

    monkeypatch.setattr(local, "atomic_write", full)
    training.save(2)
    assert checkpoints(training) == ["latest", "step-00000002"] and training.store.latest() == "step-00000002"
    assert training.said == []


def test_a_best_checkpoint_that_cannot_be_read_for_now_is_not_removed(tmp_path, world, monkeypatch):
    training = Training(tmp_path / "run", world, keep=1, keep_best="eval.top1")
    training.save(1, accuracy={"eval": {"top1": 0.9}}, evaluated_at=1)
    read = training.store.read

    def lost(name, file):
        if name == "step-00000001":
            raise OSError(errno.EIO, "Input/output error")
        return read(name, file)

    monkeypatch.setattr(training.store, "read", lost)
    training.save(2, accuracy={"eval": {"top1": 0.1}}, evaluated_at=2)
    assert "step-00000001" in checkpoints(training) and training.store.latest() == "step-00000002"
    assert "could not be removed" in training.said[0] and "Input/output error" in training.said[0]


@pytest.mark.parametrize(("number", "kind"), [("EIO", RestartError), ("ESTALE", RestartError), ("EACCES", UserError)])
def test_a_folder_that_cannot_be_read_for_now_is_no_bad_input(tmp_path, monkeypatch, number, kind):
    store = LocalStore(tmp_path)
    store.prepare("step-00000003", 0)
    store.publish("step-00000003", Manifest(STATE, {}, {}, {}).to_json())
    (saved,) = usable_checkpoints(store)

    def lost(*_):
        raise OSError(getattr(errno, number), "the reason")

    monkeypatch.setattr(store, "read", lost)
    with pytest.raises(kind, match=r"step-00000003/manifest\.json cannot be read \(the reason\): check the disk"):
        saved.read_manifest()
    monkeypatch.setattr(store, "names", lost)
    with pytest.raises(kind, match=r"cannot be read \(the reason\): check the disk or the store, and start again"):
        usable_checkpoints(store)


def test_a_file_that_another_owner_writes_by_now_is_not_touched(tmp_path):
    """A process that was suspended between two steps of its save, whose run another machine has taken over since."""
    store = LocalStore(tmp_path)
    store.prepare("step-00000003", 0)
    store.write("step-00000003", "rank-00001.safetensors", [memoryview(b"the new owner's")])
    with pytest.raises(FileExistsError):
        store.write("step-00000003", "rank-00001.safetensors", [memoryview(b"old")])
    written = tmp_path / "step-00000003.partial" / "rank-00001.safetensors"
    assert written.read_bytes() == b"the new owner's"


def test_what_is_kept(tmp_path, world):
    training = Training(tmp_path / "run", world, keep=2, keep_best="eval.top1")
    training.checkpointer.keep_every = 40
    for step, top1 in [(10, 0.1), (20, 0.9), (30, 0.2), (40, 0.3), (50, 0.4), (60, 0.5), (70, 0.9)]:
        evaluated = {"evaluated_at": step if step != 70 else 60}  # an old figure is none
        training.save(step, accuracy={"eval": {"top1": top1}}, **evaluated)
    assert checkpoints(training) == ["latest", *(f"step-000000{step}" for step in (20, 40, 60, 70))]


@pytest.mark.parametrize(
    ("saved", "keep_every", "kept"),
    [
        (range(0, 6000, 313), 1563, [0, 1565, 3130, 4695, 5947]),  # which no save is a multiple of
        (range(0, 71, 10), 40, [0, 40, 70]),
        ([0, 250, 290, 310, 500], 100, [0, 250, 310, 500]),  # two multiples since the save before
        ([5, 12, 19], 10, [12, 19]),
        ([5, 12, 19], None, [19]),
    ],
)
def test_the_first_checkpoint_at_or_after_each_multiple_is_kept(saved, keep_every, kept):
    left = {}
    for step in saved:
        left[step_name(step)] = replace(STATE, step=step)
        for stale in stale_checkpoints(left, keep=1, keep_every=keep_every, best=None):
            del left[stale]
    assert [state.step for state in left.values()] == kept


def test_an_old_checkpoint_that_cannot_be_removed_is_no_failed_save(tmp_path, world, monkeypatch):
    training = Training(tmp_path / "run", world, keep=1)
    training.save(1)

    def refuse(name):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(training.store, "remove", refuse)
    assert training.save(2).name == training.store.latest()
    assert training.said == [
        f"old checkpoints in {training.store.describe('')} could not be removed (Operation not permitted)"
    ]


def test_an_average_that_starts_or_ends_says_so(training, tmp_path, world):
    saved, expected = training.save(3), training.everything()
    without = Training(tmp_path / "run", world, seed=1, ema=False)
    without.checkpointer.load(saved)
    assert "has an average of the weights, which is dropped" in without.said[0]
    saved = without.save(4)
    again = Training(tmp_path / "run", world, seed=2)
    again.checkpointer.load(saved)
    assert "has no average of the weights: it starts from the weights" in again.said[0]
    for part in again.ema.slices():
        assert torch.equal(part.values, expected[0]["weight", part.name])


def test_the_average_replaces_the_weights_and_gives_them_back(training):
    before = training.everything()
    with training.ema.applied():
        for part in training.engine.master_weights():
            assert torch.equal(part.values, before[0]["ema", part.name])
            assert not torch.equal(part.values, before[0]["weight", part.name])
    assert_same(training.everything(), before)


# ---- damage


def cut(folder):
    os.truncate(folder / "rank-00000.safetensors", 900)


def flip(folder):
    file = folder / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def zero(folder):
    file = folder / "rank-00000.safetensors"
    file.write_bytes(bytes(file.stat().st_size))


def lose(folder):
    (folder / "rank-00000.safetensors").unlink()


def forget(folder):
    """Takes one tensor out of the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = manifest["files"]["rank-00000.safetensors"]["tensors"]
    tensors.remove(next(entry for entry in tensors if entry[:2] == ["exp_avg", "1.bias"]))
    del manifest["crc32"]  # as a manifest that was written wrong
    (folder / "manifest.json").write_text(json.dumps(manifest))


def halve_manifest(folder):
    os.truncate(folder / "manifest.json", 100)


def zero_manifest(folder):
    (folder / "manifest.json").write_bytes(bytes(1000))


def flip_a_digit(folder):
    """One bit of a number: without a checksum, training would continue with other samples."""
    text = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(text.replace(b'"consumed": 8', b'"consumed": 9'))


def lose_manifest(folder):
    (folder / "manifest.json").unlink()


DAMAGES = [
    (cut, r"rank-00000.safetensors has 900 bytes instead of [\d,]+, which parameter '\S+' \(\S+\) is in"),
    (flip, r"rank-00000.safetensors does not hold the bytes of parameter '1.bias' \(ema\) that were written"),
    (zero, r"rank-00000.safetensors does not hold the bytes of parameter '\S+' \(\S+\) that were written"),
    (lose, r"rank-00000.safetensors does not exist, which parameter '\S+' \(\S+\) is in"),
    (forget, r"manifest.json names no file with element 0 of parameter '1.bias' \(exp_avg\)"),
    (zero_manifest, r"manifest.json is not what was written there: the file is damaged"),
    (flip_a_digit, r"manifest.json is not what was written there: the file is damaged"),
    (halve_manifest, r"manifest.json is not what was written there: the file is damaged"),
    (lose_manifest, r"manifest.json does not exist: \S+ is not a complete checkpoint"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_damage_names_file_and_parameter_and_the_checkpoint_before_is_used(training, tmp_path, world, damage, message):
    older, expected = training.save(3), training.everything()
    training.train()
    newer = training.save(4)
    damage(training.store.folder / newer.name)
    store = LocalStore(training.store.folder)
    older, newer = Checkpoint(store, older.name), Checkpoint(store, newer.name)
    other = Training(tmp_path / "run", world, seed=1, store=store)
    with pytest.raises(DamagedCheckpoint, match=message):
        other.checkpointer.load(newer)

    start = Start(replace(STATE, step=4), 9, newer, "", None)
    start_at_newer, start = start, load_start(start, other.checkpointer, other.run, world)
    assert (start.step, start.checkpoint) == (3, older)
    assert_same(other.everything(), expected)
    assert read_events(other.run)[-1]["event"] == "checkpoint_damaged"
    assert f"going back to {older}" in read_events(other.run)[-1]["message"]

    shutil.rmtree(training.store.folder / older.name)
    with pytest.raises(UserError, match=f"{message}.*no older checkpoint to continue from"):
        load_start(start_at_newer, other.checkpointer, other.run, world)


def test_another_model_is_refused(training, tmp_path, world):
    saved = training.save(3)
    with pytest.raises(UserError, match=r"parameter '0.bias' is \[7\] there and \[8\] in this model") as error:
        Training(tmp_path / "run", world, width=8).checkpointer.load(saved)
    assert not isinstance(error.value, DamagedCheckpoint)  # an older one would not fit either


# ---- export


def test_the_export_is_the_weights_or_their_average(training, tmp_path):
    saved, (expected, _) = training.save(3), training.everything()
    for kind in ("weight", "ema"):
        export_weights(find_checkpoint(str(saved)), tmp_path / "out.safetensors", kind)
        weights = load_file(tmp_path / "out.safetensors")
        assert weights.keys() == {name for of_kind, name in expected if of_kind == kind}
        for name, values in weights.items():
            assert values.shape == dict(training.model.named_parameters())[name].shape
            assert torch.equal(values.flatten(), expected[kind, name])
    flip(training.store.folder / saved.name)  # in the average
    export_weights(saved, tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="does not hold the bytes of parameter '1.bias'"):
        export_weights(saved, tmp_path / "other.safetensors", "ema")
    assert not list(tmp_path.glob("*other*"))


def test_the_export_of_a_run_is_made_again_only_for_another_checkpoint(tmp_path, world):
    training = Training(tmp_path / "run", world, ema=False)
    training.train()
    out = training.run.path / "model.safetensors"
    saved = training.save(1)
    export_run(saved, training.run)
    first = out.stat().st_ino
    export_run(saved, training.run)
    assert out.stat().st_ino == first
    training.train()
    export_run(training.save(2), training.run)
    assert torch.equal(load_file(out)["1.bias"], training.model[1].bias.detach())
    assert not (training.run.path / "model_ema.safetensors").exists()
    with pytest.raises(UserError, match="has no average of the weights"):
        export_weights(saved, tmp_path / "out.safetensors", "ema")


# ---- an object store


@pytest.fixture
def url(s3_bucket):
    """The URL of a folder in a bucket, which is empty afterwards."""
    yield "s3://bucket/run"
    s3_bucket.rm("bucket/run/")


def test_a_store_holds_checkpoints_too(tmp_path, world, url, s3_bucket):
    store = open_store(url)
    training = Training(tmp_path / "run", world, store=store, keep=2)
    training.train()
    for step in (1, 2, 3):
        training.train()
        saved, expected = training.save(step), training.everything()
    assert (str(saved), store.latest(), store.names()) == (
        f"{url}/{saved.name}",
        saved.name,
        ["step-00000002", saved.name],
    )
    other = Training(tmp_path / "run", world, seed=1, store=open_store(url))
    other.checkpointer.load(usable_checkpoints(other.store)[0])
    assert_same(other.everything(), expected)
    export_weights(find_checkpoint(url), tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["1.bias"], expected[0]["weight", "1.bias"])

    path = f"bucket/run/{saved.name}/rank-00000.safetensors"
    content = s3_bucket.cat_file(path)
    s3_bucket.pipe_file(path, content[:-1])
    with pytest.raises(DamagedCheckpoint, match=rf"{saved.name}/rank-00000.safetensors has .* bytes instead of"):
        other.checkpointer.load(saved)
    s3_bucket.rm(path)
    with pytest.raises(DamagedCheckpoint, match="does not exist"):
        other.checkpointer.load(saved)


def test_a_store_shows_no_checkpoint_before_its_manifest(tmp_path, world, url, s3_bucket, monkeypatch):
    training = Training(tmp_path / "run", world, store=open_store(url))
    good = training.save(1)

    def unreachable(*arguments):
        raise OSError("the network is gone")

    for verb in ("publish", "discard"):
        monkeypatch.setattr(training.store, verb, unreachable)
    training.save(2)
    assert "the network is gone" in training.said[0]
    assert s3_bucket.exists("bucket/run/step-00000002/rank-00000.safetensors")
    assert training.store.names() == [good.name] and training.store.latest() == good.name
    Training(tmp_path / "run", world, store=open_store(url))  # the next start clears it away
    assert not s3_bucket.exists("bucket/run/step-00000002/rank-00000.safetensors")


# ---- shares of slices


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_shares_cover_the_line_once_and_evenly(size):
    lengths = [("a", 0, 5), ("b", 3, 1), ("c", 0, 20)]
    slices = [ParameterSlice(name, start, torch.arange(length)) for name, start, length in lengths]
    shares = [share(slices, rank, size) for rank in range(size)]
    counts = [sum(part.values.numel() for part in of_rank) for of_rank in shares]
    assert max(counts) - min(counts) <= 1
    found = [(p.name, p.start + i) for of_rank in shares for p in of_rank for i in range(p.values.numel())]
    assert found == [(p.name, p.start + i) for p in slices for i in range(p.values.numel())]
    assert all(torch.equal(p.values, torch.arange(p.values[0], p.values[0] + len(p.values))) for s in shares for p in s)
