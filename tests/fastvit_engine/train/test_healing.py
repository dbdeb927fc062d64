"""Runs that `fastvit train` heals by itself: the record is the one of a run that nothing happened to, to the bit."""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fastvit_engine.cli import main
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.observe.run_folder import RunFolder

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

KILLS = int(os.environ.get("FASTVIT_TEST_KILLS", 1))  # of ranks, at random steps
EVERY = 10  # steps between checkpoints
SETTINGS = [
    f"train.duration={50 + 20 * KILLS} steps",
    f"checkpoint.every={EVERY} steps",
    "checkpoint.in_memory=false",  # as on several machines: test_restarts.py has the rest
    "train.precision=fp32",
    "model.dropout=0.1",  # its random numbers must be repeated too
    "data.num_workers=1",
    "watchdog.timeout_seconds=8",
    "watchdog.slow_rank_laps=1",
]

# Imported by every Python process that has it on its path: rank 1 sleeps before each forward pass.
SLOW_RANK_1 = """
import os
if os.environ.get("RANK") == "1":
    import time
    from fastvit_engine.objectives.classify import Classify
    losses = Classify.losses
    def slow_losses(self, model, batch):
        time.sleep(0.2)
        return losses(self, model, batch)
    Classify.losses = slow_losses
"""


def record(run):
    """Every figure of a run that the machine's speed does not enter."""
    rows, _ = read_metrics(run.metrics)
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["samples_hash"]) for row in rows]


def steps_done(run):
    return run.metrics.read_text().count("samples_hash") if run.metrics.exists() else 0


def events(run, kind):
    return [event for event in read_events(run) if event["event"] == kind]


def children(process):
    """Of `fastvit train`: the ranks, in order."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for(condition, process, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before its time"
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.001)


@pytest.fixture
def start(train_command, tmp_path):
    """Starts the run in a process group of its own."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_RANK_1)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    processes = []

    def begin(run, *settings, resume="never"):
        command = train_command(run.path, *SETTINGS, *settings, processes=2, resume=resume, max_restarts=3)
        log = open(tmp_path / "log", "a")  # noqa: SIM115 - as long as the process
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        return processes[-1]

    yield begin
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    print((tmp_path / "log").read_text())


@pytest.mark.timeout(600 + 60 * KILLS)
def test_a_run_that_loses_ranks_hangs_and_is_asked_to_leave(start, train, tmp_path, capsys):
    chance = random.Random(KILLS)
    run = RunFolder(tmp_path / "run")
    process = start(run)

    # ---- ranks are killed
    for kill in range(KILLS):
        moment = EVERY * (kill + 1) + chance.randint(1, EVERY - 1)
        wait_for(lambda moment=moment: steps_done(run) >= moment, process)
        os.kill(chance.choice(children(process)), signal.SIGKILL)
        wait_for(lambda kill=kill: len(events(run, "start")) == kill + 2, process)
    restarts = [event["message"] for event in events(run, "restart")]
    assert len(restarts) == KILLS
    assert all("was killed by SIGKILL" in message for message in restarts)
    assert len(events(run, "failure")) + len(events(run, "hang")) == KILLS

    # ---- one stops
    hangs = len(events(run, "hang"))
    wait_for(lambda: steps_done(run) >= EVERY * (KILLS + 1) + 2, process)
    stopped_at, stopped = time.monotonic(), chance.randrange(2)
    os.kill(children(process)[stopped], signal.SIGSTOP)
    wait_for(lambda: len(events(run, "hang")) > hangs, process)
    detected_after = time.monotonic() - stopped_at
    wait_for(lambda: len(events(run, "start")) == KILLS + 2, process)
    event = events(run, "hang")[-1]
    assert event["ranks"] == [stopped]
    assert f"rank {stopped} on {event['host']} was last heard of" in event["message"]
    assert list(run.stacks.glob(f"*-rank-{1 - stopped}.txt"))
    assert detected_after > 6
    print(f"a stopped rank was named after {detected_after:.1f} s of 8")

    # ---- somebody looks, and a rank is slow
    capsys.readouterr()
    assert main(["stacks", str(run.path)]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [file.name.partition("-rank-")[2] for file in files] == ["0.txt", "1.txt"]
    assert "_listen" in files[0].read_text()  # the thread that waits for signals
    wait_for(lambda: events(run, "slow_rank"), process)
    assert all(event["ranks"] == [1] for event in events(run, "slow_rank"))

    # ---- every process of the run is asked to leave, in the middle of saving where the moment can be caught
    saved = len(list(run.checkpoints.glob("step-*")))
    assert saved
    with contextlib.suppress(AssertionError):
        wait_for(lambda: list(run.checkpoints.glob("*.partial")), process, seconds=10)
    asked_at = steps_done(run)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 76
    event = read_events(run)[-1]
    assert (event["event"], event["reason"]) == ("stop", "preempted")
    assert asked_at <= event["step"] <= asked_at + 2
    assert (run.checkpoints / "latest").read_text() == f"step-{event['step']:08d}"
    assert not list(run.checkpoints.glob("*.partial"))

    # ---- the same command again
    train(run.path, *SETTINGS, processes=2, resume="auto")
    assert record(run) == record(RunFolder(train(tmp_path / "uninterrupted", *SETTINGS, processes=2)))
