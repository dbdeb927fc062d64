"""Two starts of a run: the second is refused, and a run that has lost its folder writes nothing more into it."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fastvit_engine.cli import main
from fastvit_engine.observe.metrics import read_metrics
from tests.in_full import in_full, only_in_full

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LONG = ["train.duration=100000 steps", "schedule.warmup=0 steps", "checkpoint.every=20 steps"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def start(train_command):
    """Starts a run, whose processes are dead when the test ends."""
    started = []

    def begin(run, *settings, processes=2, **options):
        command = train_command(run, *LONG, *settings, processes=processes, resume="auto", **options)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_steps(run, steps, process, seconds=200):
    deadline = time.monotonic() + seconds
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("samples_hash") >= steps):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.05)


def written(run, checkpoints):
    """All that another owner would find changed."""
    names = sorted(path.name for path in checkpoints.iterdir() if path.name[:6] != "owner-" and path.suffix == "")
    tensorboard = {path.name: path.read_bytes() for path in (run / "tensorboard").iterdir()}
    return names, (checkpoints / "latest").read_text(), (run / "metrics.jsonl").read_bytes(), tensorboard


def errors_of(process, seconds=120):
    """The sentences that start with the name of the program."""
    _, errors = process.communicate(timeout=seconds)
    return [line for line in errors.splitlines() if line.startswith("fastvit: error:")], errors


def test_the_same_command_twice_is_one_run(start, train_arguments, tmp_path, capsys):
    """With another learning rate the second time; also into another folder with the same place for checkpoints."""
    run, place = tmp_path / "run", f"checkpoint.path={tmp_path}/checkpoints"
    first = start(run, place, processes=1)
    wait_for_steps(run, 2, first)
    for out, what in ((run, "run folder"), (tmp_path / "other", f"{tmp_path}/checkpoints")):
        assert main(train_arguments(out, *LONG, place, "optimizer.learning_rate=0.5", resume="auto")) == 2
        error = capsys.readouterr().err
        assert error.count("fastvit: error:") == 1
        assert what in error and f"is in use by process {first.pid} on " in error
    assert not (tmp_path / "other").exists()

    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 76
    assert not list(tmp_path.rglob("owner-*.json"))
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl")[0]]
    assert steps == list(range(1, len(steps) + 1))


@only_in_full
def test_a_killed_run_is_taken_over_at_once_and_one_whose_rank_was_killed_still_has_its_owner(start, tmp_path):
    run = tmp_path / "run"
    first = start(run, max_restarts=3)
    wait_for_steps(run, 2, first)
    rank = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()[0])
    os.kill(rank, signal.SIGKILL)
    refused = start(run)  # while the first one starts its ranks again
    (error,), errors = errors_of(refused)
    assert refused.returncode == 2 and f"is in use by process {first.pid} on " in error, errors
    first.kill()
    first.wait()
    steps = (run / "metrics.jsonl").read_text().count("samples_hash")
    second = start(run)
    wait_for_steps(run, steps + 3, second)
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 76
    output, _ = second.communicate()
    assert f"taking over run folder {run}: process {first.pid} on" in output and "waiting" not in output


@pytest.mark.parametrize(("where", "processes"), [("run folder", 1), in_full("checkpoints", 2)])
def test_a_run_that_has_lost_its_place_ends_before_it_writes_and_is_not_restarted(start, tmp_path, where, processes):
    run, checkpoints = tmp_path / "run", tmp_path / "checkpoints"
    process = start(run, f"checkpoint.path={checkpoints}", processes=processes, max_restarts=3)
    wait_for_steps(run, 25, process)
    os.killpg(process.pid, signal.SIGSTOP)  # another machine sees no heartbeat any more
    place = run if where == "run folder" else checkpoints
    record = json.loads((place / "owner-1.json").read_text())
    record |= {"token": "another", "process": 4321, "host": "node-7", "machine": "elsewhere"}
    (place / "owner-2.json").write_text(json.dumps(record))
    (place / "owner-1.json").unlink()
    before = written(run, checkpoints)
    os.killpg(process.pid, signal.SIGCONT)
    (error,), errors = errors_of(process)
    assert process.returncode == 2, errors
    assert "no longer belongs to this run but to process 4321 on node-7" in error
    assert "starting again" not in errors
    assert (place / "owner-2.json").exists() and not list(checkpoints.glob("*.removed"))
    changeable = 4 if where == "run folder" else 2  # the run folder is still its own
    assert written(run, checkpoints)[:changeable] == before[:changeable]


def test_a_run_folder_that_vanishes_ends_the_run_with_one_sentence_and_does_not_come_back(start, tmp_path):
    run = tmp_path / "run"
    process = start(run, max_restarts=3)
    wait_for_steps(run, 5, process)
    run.rename(tmp_path / "moved")
    (error,), errors = errors_of(process)
    assert f"run folder {run} is gone, removed or unmounted" in error
    assert "Traceback" not in errors and "starting again" not in errors
    assert not run.exists()
    shutil.rmtree(tmp_path / "moved")
