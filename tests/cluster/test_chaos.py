"""What networks do to a job of three hosts, and what it makes of it; nobody looks after it."""

import os
import signal
import time

import pytest

from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.run_folder import RunFolder
from tests.cluster.harness import EVERYTHING, LAUNCH, assert_same_curve, rows
from tests.cluster.hosts import PATIENCE, wait_until

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not EVERYTHING, reason="minutes of broken networks: FASTVIT_TEST_CLUSTER=all"),
]

TIMEOUT = 10.0  # seconds without progress until a rank is given up
SETTINGS = [f"watchdog.timeout_seconds={TIMEOUT}", "watchdog.slow_phase_seconds=30"]


@pytest.fixture
def job(hosts, jobs, training, tmp_path):
    """Starts the run on every host by torchrun, and returns its folder once it has a checkpoint to go back to."""

    def start(*settings, nodes="3"):
        out = tmp_path / "run"
        for host in range(hosts.count):
            command = ["bash", str(LAUNCH / "torchrun" / "run.sh"), "--head", hosts.name(0), "--nodes", nodes]
            command += ["--processes-per-node", "1", "--max-restarts", "3", "--", *training(out, *SETTINGS, *settings)]
            jobs.start(host, command)
        wait_until(lambda: (out / "checkpoints" / "step-00000004").exists(), what="the first checkpoint")
        return RunFolder(out)

    return start


def events(run, kind):
    return [event for event in read_events(run) if event["event"] == kind]


def test_a_host_that_falls_silent_is_named_and_the_others_go_on(hosts, jobs, job, slowly, single):
    run = job(nodes="2:3")
    cut_at = time.monotonic()
    hosts.cut(2, silently=True)
    wait_until(lambda: events(run, "hang") or events(run, "failure"), what="somebody who notices")
    noticed = time.monotonic() - cut_at
    codes = [process.wait(timeout=PATIENCE) for process in jobs.started[:2]]
    output = "".join(process.log.read_text(errors="replace") for process in jobs.started)
    assert codes == [0, 0], output
    assert_same_curve(run.path, single)
    event = (events(run, "hang") + events(run, "failure"))[0]
    assert "node-2" in event["message"]
    assert noticed < TIMEOUT + 15
    assert [start["world_size"] for start in events(run, "start")] == [3, 2]
    print(
        f"noticed after {noticed:.1f} s, finished {time.monotonic() - cut_at:.1f} s after the cut: {event['message']}"
    )


def test_a_cut_that_is_mended_in_time_changes_nothing(hosts, jobs, job, slowly, single):
    run = job()
    hosts.cut(1)
    time.sleep(TIMEOUT / 3)
    hosts.mend(1)
    codes, output = jobs.wait()
    assert codes == [0, 0, 0], output
    assert_same_curve(run.path, single)
    assert len(events(run, "start")) == 1


@pytest.mark.parametrize("cable", [{"delay": 0.02}, {"loss": 0.03}])
def test_a_bad_cable_makes_a_run_slower_and_nothing_else(hosts, jobs, training, job, single, cable):
    hosts.degrade(1, **cable)
    run = job()
    codes, output = jobs.wait()
    assert codes == [0, 0, 0], output
    assert_same_curve(run.path, single)


def test_a_checkpoint_that_was_altered_is_passed_over(hosts, jobs, job, slowly, single):
    run = job()
    wait_until(lambda: len(rows(run.path)) >= 9 and (run.checkpoints / "step-00000008").exists(), what="step 9")
    victims = [process for process in hosts.processes(1) if is_rank(process)]
    altered = next((run.checkpoints / "step-00000008").glob("rank-*.safetensors"))
    content = bytearray(altered.read_bytes())
    content[-5] ^= 0x10
    altered.write_bytes(content)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    codes, output = jobs.wait()
    assert codes == [0, 0, 0], output
    assert_same_curve(run.path, single)
    (damage,) = events(run, "checkpoint_damaged")
    assert altered.name in damage["message"] and "step-00000004" in damage["message"]


def is_rank(process):
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            words = file.read()
    except OSError:
        return False
    return b"fastvit_engine\0train" in words and b"agent.py" not in words and b"run.sh" not in words
