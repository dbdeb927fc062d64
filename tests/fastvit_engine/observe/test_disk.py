"""A disk that is full or lost: what a run needs is tried again, what is for people is left out."""

import errno
import os
import shutil
import time

import pytest

from fastvit_engine.errors import RestartError, UserError
from fastvit_engine.observe import disk
from fastvit_engine.observe.disk import if_possible, insist, is_final
from fastvit_engine.observe.events import read_events, record_event
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.observe.recorder import Recorder
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.observe.trackers.tensorboard import TensorBoard
from tests.fastvit_engine.observe.conftest import train_row

FULL = OSError(errno.ENOSPC, "No space left on device")
LOST = [FULL, OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(disk, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(disk, "_warned", set())


def fails(times, error=FULL):
    """An action that raises `error` so many times, then returns 7."""
    left = [error] * times

    def action(*_):
        if left:
            raise left.pop()
        return 7

    return action


@pytest.mark.parametrize("error", LOST, ids=lambda error: errno.errorcode[error.errno])
def test_what_is_needed_is_tried_again_and_said_once(capsys, error):
    assert insist(fails(2, error), "runs/a/x") == 7
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"fastvit: warning: runs/a/x could not be written ({error.strerror}): trying again for 1 s"


def test_what_is_needed_ends_the_run_for_a_restart_when_it_stays_away():
    began = time.monotonic()
    with pytest.raises(RestartError, match=r"runs/a/x could not be written for \d s \(No space left on device\): make"):
        insist(fails(10**6), "runs/a/x")
    assert 1 <= time.monotonic() - began < 5


def test_bad_input_is_not_tried_again():
    with pytest.raises(UserError):
        insist(fails(1, UserError("no")), "runs/a/x")


def test_what_is_for_people_is_left_out_with_one_warning(capsys):
    assert [if_possible(fails(1), "runs/a/x") for _ in range(3)] == [False] * 3
    assert if_possible(fails(0), "runs/a/x")
    assert capsys.readouterr().err.splitlines() == [
        "fastvit: warning: runs/a/x could not be written (No space left on device): training continues without"
    ]


@pytest.mark.parametrize(
    ("number", "final"), [("EACCES", True), ("EROFS", True), ("ENOTDIR", True), ("ENOSPC", False), ("EIO", False)]
)
def test_a_place_that_is_wrong_is_told_from_a_disk_that_fails(number, final):
    assert is_final(OSError(getattr(errno, number), "")) == final


@pytest.fixture
def full(monkeypatch):
    """Makes every write and rename fail as on a full disk, as long as the list holds something."""
    switch, write, replace = [], os.write, os.replace

    def on_disk(real):
        def call(*arguments, **named):
            if switch and arguments[0] not in (1, 2):
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **named)

        return call

    monkeypatch.setattr(os, "write", on_disk(write))
    monkeypatch.setattr(os, "replace", on_disk(replace))
    return switch


def test_events_on_a_full_disk_are_a_warning(tmp_path, full, capsys):
    run = RunFolder(tmp_path)
    record_event(run, "start", "2 processes")
    full.append(True)
    for _ in range(3):
        record_event(run, "slow_rank", "rank 1")
    full.clear()
    record_event(run, "stop", "finished")
    assert [event["event"] for event in read_events(run)] == ["start", "stop"]
    assert capsys.readouterr().err.count("events.jsonl could not be written") == 1


def test_an_event_does_not_bring_a_vanished_run_folder_back(tmp_path, capsys):
    run = RunFolder(tmp_path / "gone")
    record_event(run, "start", "2 processes")
    shutil.rmtree(run.path)
    record_event(run, "failure", "rank 1 is gone")
    assert not run.path.exists() and capsys.readouterr().err == ""


def test_a_row_of_metrics_waits_for_room_and_is_there_once(tmp_path, full):
    run = RunFolder(tmp_path)
    recorder = Recorder(run, 10, 0)
    recorder.training(train_row(1))
    full.append(True)
    waiting = []

    def check():
        waiting.append(1)
        if len(waiting) == 3:
            full.clear()

    recorder._check_owner = check
    recorder.training(train_row(2))
    assert [row["step"] for row in read_metrics(run.metrics)[0]] == [1, 2]
    full.append(True)
    with pytest.raises(RestartError, match=r"metrics\.jsonl could not be written for"):
        recorder.training(train_row(3))
    full.clear()
    assert [row["step"] for row in read_metrics(run.metrics)[0]] == [1, 2]


def test_a_run_that_is_not_its_own_any_more_writes_no_row(tmp_path):
    run = RunFolder(tmp_path)

    def check():
        raise UserError("it belongs to another run")

    with pytest.raises(UserError, match="belongs to another run"):
        Recorder(run, 10, 0, check_owner=check)  # which would drop rows of the other run
    owned = [True]
    recorder = Recorder(run, 10, 0, check_owner=lambda: None if owned else check())
    owned.clear()
    with pytest.raises(UserError, match="belongs to another run"):
        recorder.training(train_row(1))
    assert not run.metrics.exists()


@pytest.mark.parametrize(("number", "kind"), [("EROFS", UserError), ("EACCES", UserError), ("ENOSPC", RestartError)])
def test_a_place_that_is_wrong_is_said_at_once_where_another_one_can_be_chosen(number, kind):
    began = time.monotonic()
    with pytest.raises(kind) as raised:
        insist(fails(10**6, OSError(getattr(errno, number), "why")), "runs/a", instead="one with --out")
    assert (time.monotonic() - began < 0.5) == (kind is UserError)
    if kind is UserError:
        assert str(raised.value) == "runs/a cannot be written (why): choose another one with --out"


@pytest.mark.parametrize("moment", ["opening", "writing", "closing"])
def test_tensorboard_on_a_lost_disk_is_a_warning(tmp_path, monkeypatch, capsys, moment):
    run = RunFolder(tmp_path)
    if moment == "opening":
        run.tensorboard.touch()  # in place of the folder
    tracker = TensorBoard(run, 0)
    recorder = Recorder(run, 10, 0, [tracker])
    recorder.training(train_row(1))
    if moment != "opening":
        target = (
            ("fastvit_engine.observe.trackers.tensorboard.write_all",) if moment == "writing" else (tracker, "close")
        )
        monkeypatch.setattr(*target, fails(10**6))
    for step in range(2, 40):
        recorder.training(train_row(step))
    recorder.close()
    monkeypatch.undo()
    assert [row["step"] for row in read_metrics(run.metrics)[0]] == list(range(1, 40))
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastvit: warning: ")]
    assert len(warned) == 1 and f"{run.tensorboard} could not be written" in warned[0]
