"""How the runs of a study are trained: what is kept, resumed, tried again and said."""

import json
import os
import signal
import threading
import time

import pytest

from fastvit_engine.errors import UserError
from fastvit_engine.study.execution import Executor
from fastvit_engine.study.pace import Pace
from fastvit_engine.study.records import StudyFolder


@pytest.fixture
def execute(fake, tmp_path):
    """execute(runs) -> exit code, what was said, the records by name"""

    def run(runs, shots=5):
        folder, lines, settled = StudyFolder(tmp_path / "out"), [], []
        executor = Executor(folder, shots, 1, Pace(1), lines.append, command=fake)
        code = executor.train(runs, lambda: settled.append(1))
        return code, lines, folder.records(runs)

    return run


def starts(tmp_path, run):
    return len((tmp_path / "out" / "runs" / run.name / "starts").read_text())


def test_every_run_leaves_a_record(execute, plan, tmp_path):
    _, runs = plan()
    code, lines, records = execute(runs)
    assert code == 0 and [record["state"] for record in records.values()] == ["finished"] * 4
    record = records[runs[3].name]
    assert record["settings"] == {"model.pool": "gap", "optimizer.learning_rate": 0.01, "seed": 0}
    assert (record["top1"], record["fewshot5"], record["samples"]) == (0.1, 0.05, 300)
    assert record["exaflops"] == runs[3].exaflops and record["steps"] == 20
    assert record["command"].startswith("fastvit train quickstart --set ")
    assert "training" in (tmp_path / "out" / "logs" / f"{runs[3].name}.log").read_text()
    assert lines[0].startswith("[1 of 4] pool=cls, learning_rate=0.001, seed 0: 20 steps; log: ")
    assert "top-1 1.0 %, 5-shot 0.5 %" in lines[1] and lines[1].endswith(" left") and "left" not in lines[-1]


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ("bad input", "the loss is nan: lower the rate"),
        ("killed", "fastvit train was killed by SIGKILL: see "),
        ("no few-shot", "has no 5-shot accuracy of the last step"),
    ],
)
def test_a_run_that_fails_is_named_and_the_others_follow(execute, plan, tmp_path, monkeypatch, behaviour, says):
    _, runs = plan()
    monkeypatch.setenv("FAKE_0_001", behaviour)
    code, lines, records = execute(runs)
    assert code == 1
    assert [records[run.name]["state"] for run in runs] == ["failed", "finished"] * 2
    assert says in records[runs[0].name]["failed"] and any(says in line for line in lines)
    monkeypatch.delenv("FAKE_0_001")
    failed = [run for run in runs if records[run.name]["state"] == "failed"]
    code, _, records = execute(failed)  # tried again
    assert code == 0 and {record["state"] for record in records.values()} == {"finished"}


def test_a_request_to_stop_reaches_the_run_and_ends_the_study(execute, plan, tmp_path, monkeypatch):
    _, runs = plan()
    monkeypatch.setenv("FAKE_0_01", "waits")
    waiting = tmp_path / "out" / "runs" / runs[1].name / "waiting"

    def stop():
        while not waiting.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    code, lines, records = execute(runs)
    assert code == 76 and lines[-1] == "stopped on request: the same command continues"
    assert [records[run.name]["state"] for run in runs if run.name in records] == ["finished", "begun"]
    monkeypatch.delenv("FAKE_0_01")
    code, _, records = execute(runs[1:])
    assert code == 0 and starts(tmp_path, runs[1]) == 2


def test_another_study_in_the_same_folder_is_refused(execute, plan):
    _, runs = plan()
    execute(runs)
    _, others = plan("optimizer.weight_decay=0.5")
    says = r"is of other settings .*\(optimizer\.weight_decay was 0\.05 and is 0\.5\): set them back, or choose another"
    with pytest.raises(UserError, match=says):
        execute(others)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"state": "x", "made_of": {}}', b"\xff", b"[" * 100_000]
)
def test_a_damaged_record_is_refused(execute, plan, tmp_path, content):
    _, runs = plan()
    execute(runs[:1])
    (tmp_path / "out" / "records" / f"{runs[0].name}.json").write_bytes(content)
    with pytest.raises(UserError, match="remove it, and the run is measured again"):
        StudyFolder(tmp_path / "out").records(runs)


def test_the_time_is_assumed_and_then_measured(plan):
    _, runs = plan()
    pace = Pace(1)
    assert pace.left(runs) == "" and "an assumption until a run is finished" in pace.describe(runs)
    flops = runs[0].computed_flops
    pace.measure(flops, 60.0, 70.0)
    pace.measure(flops, 60.0, 70.0)
    assert pace.left(runs[:1]) == "about 1 min 10 s left"
    assert pace.describe(runs[:2]) == "about 2 min 20 s, as the runs before took"


def test_records_are_whole_json(execute, plan, tmp_path):
    _, runs = plan()
    execute(runs[:1])
    for path in (tmp_path / "out" / "records").glob("*"):
        json.loads(path.read_text())
