"""A tracker's library in a process of its own: what it gets, and that it cannot stop or slow training."""

import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvit_engine.observe.recorder import Recorder
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.observe.trackers import process
from fastvit_engine.observe.trackers.child import OPEN, TrackedRun, serve
from fastvit_engine.observe.trackers.process import TrackerProcess
from tests.fastvit_engine.observe.conftest import eval_row, few_shot_row, train_row

MODULE = "tests.fastvit_engine.observe.trackers.fake_library"
Begin = Callable[..., TrackerProcess]


def about(folder: Path, project: str = "p") -> TrackedRun:
    return TrackedRun("0" * 32, "b16", project, str(folder), 7, {"seed": 3})


@pytest.fixture
def begin(tmp_path: Path) -> Begin:
    return lambda project="p": TrackerProcess(MODULE, about(tmp_path, project))


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]


def fails_within(seconds: float, call: Callable[[], None]) -> str:
    """What the call says when it fails at last; each call returns at once."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            call()
        except OSError as error:
            return str(error)
        time.sleep(0.001)
    pytest.fail("it never failed")


def test_the_library_gets_the_run_and_the_numbers_of_every_row(begin: Begin, tmp_path: Path, capfd: Any) -> None:
    tracker = begin()
    tracker.write(train_row(6, mfu=None, loss=float("nan")))
    tracker.write(eval_row(7, 0.75))
    tracker.write(few_shot_row(7, 0.25, 0.5))
    tracker.close()
    opened, first, evaluation, shots, closed = told(tmp_path)
    assert opened == {"open": "0" * 32, "name": "b16", "config": {"seed": 3}}
    assert first["step"] == 6 and first["train/lr"] == 1e-3 and first["train/loss"] != first["train/loss"]
    assert "train/mfu" not in first and "train/samples_hash" not in first and "train/step" not in first
    assert evaluation["eval/top1"] == 0.75 and shots["fewshot/5-shot"] == 0.5
    assert closed == {"finished": True}
    assert capfd.readouterr() == ("", "")  # nothing of the library's own words on the terminal


@pytest.mark.parametrize("last", [b"null\n", b""], ids=["closed", "killed"])
def test_a_run_that_stops_early_is_not_finished(last: bytes, tmp_path: Path) -> None:
    lines = json.dumps(about(tmp_path)._asdict()).encode() + b'\n{"step": 6, "numbers": {}}\n' + last
    answers = io.BytesIO()
    serve(MODULE, io.BytesIO(lines), answers)
    assert answers.getvalue() == OPEN and told(tmp_path)[-1] == {"finished": False}


@pytest.mark.parametrize("moment", ["open", "log", "close"])
def test_a_library_that_fails_says_why_in_one_line_without_secrets(begin: Begin, moment: str) -> None:
    tracker = begin(f"fails to {moment}")
    if moment == "close":
        tracker.write(train_row(1))
        said = fails_within(1, tracker.close)
    else:
        said = fails_within(60, lambda: tracker.write(train_row(1)))
    assert said.startswith(f"RuntimeError: no {moment} https://") and "secret" not in said and "\n" not in said


def test_a_library_that_never_opens_the_run_is_dropped(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "START_SECONDS", 0.2)
    tracker = begin("hangs to open")
    assert "did not open the run within" in fails_within(60, lambda: tracker.write(train_row(1)))
    assert tracker._process.poll() is not None


def test_a_library_that_stops_reading_is_dropped(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the pipe and the queue are full; until then, and then, no call waits."""
    monkeypatch.setattr(process, "_MOST_WAITING", 5)
    tracker = begin("hangs to log")
    slowest = 0.0

    def write() -> None:
        nonlocal slowest
        began = time.process_time()
        tracker.write(train_row(1))
        slowest = max(slowest, time.process_time() - began)

    assert fails_within(60, write) == "it is 5 rows behind"
    assert slowest < 1 and tracker._process.poll() is not None


def test_a_library_that_never_ends_is_killed(begin: Begin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tracker = begin("hangs to close")
    tracker.write(train_row(1))
    monkeypatch.setattr(process, "CLOSE_SECONDS", 0.3)
    with pytest.raises(OSError, match="it had not sent everything after"):
        tracker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(tracker._process.pid, 0)


def test_training_continues_without_it_after_one_warning(begin: Begin, tmp_path: Path, capfd: Any) -> None:
    run = RunFolder(tmp_path)
    recorder = Recorder(run, 9, 0, [begin("fails to open")])
    for step in range(1, 4):
        recorder.training(train_row(step))
        time.sleep(0.3 if step == 1 else 0)
    recorder.close()
    assert run.metrics.read_text().count("samples_hash") == 3
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "the run in fake_library could not be written (RuntimeError: no open" in warnings[0]
