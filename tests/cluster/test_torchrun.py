"""launch/torchrun/run.sh on several hosts."""

import os
import signal
from pathlib import Path

import pytest

from tests.cluster.harness import EVERYTHING, LAUNCH, SHARD_EVERYTHING, assert_same_curve, rows
from tests.cluster.hosts import wait_until

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RUN = ["bash", str(LAUNCH / "torchrun" / "run.sh")]
matrix = pytest.mark.skipif(not EVERYTHING, reason="the whole matrix takes minutes: FASTVIT_TEST_CLUSTER=all")


@pytest.fixture
def torchrun(hosts, jobs):
    """Starts run.sh on every host."""

    def start(arguments, *options, nodes="3", **variables):
        for host in range(int(nodes[-1])):
            common = ["--head", hosts.name(0), "--nodes", nodes, "--processes-per-node", "1", "--max-restarts", "2"]
            jobs.start(host, [*RUN, *common, *options, "--", *arguments], **variables)

    return start


def ranks(hosts, host):
    """The processes of a host that train."""
    return [process for process in hosts.processes(host) if b"fastvit_engine\0train" in command_line(process)]


def command_line(process):
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""
    return b"" if b"agent.py" in words or b"run.sh" in words else words


def steps_done(out):
    return len(rows(out)) if (out / "metrics.jsonl").exists() else 0


@pytest.mark.parametrize(
    ("nodes", "killed"), [(2, 1), pytest.param(3, 0, marks=matrix), pytest.param(3, 2, marks=matrix)]
)
def test_a_killed_rank_is_restarted_and_the_run_ends_as_if_nothing_had_happened(
    hosts, jobs, torchrun, training, single, tmp_path, nodes, killed
):
    out = tmp_path / "run"
    torchrun(training(out), nodes=str(nodes))
    wait_until(lambda: (out / "checkpoints" / "latest").exists(), what="the first checkpoint")
    victims = ranks(hosts, killed)
    assert len(victims) == 1
    os.kill(victims[0], signal.SIGKILL)
    codes, output = jobs.wait()
    assert codes == [0] * nodes, output
    assert "continuing" in output
    assert_same_curve(out, single)


@matrix
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_three_hosts_follow_the_curve_of_one_process(jobs, torchrun, training, single, tmp_path, stage, processes):
    settings = [f"zero.stage={stage}", *([SHARD_EVERYTHING] if stage == 3 else [])]
    torchrun(training(tmp_path / "run", *settings), "--processes-per-node", str(processes))
    codes, output = jobs.wait()
    assert codes == [0, 0, 0], output
    assert_same_curve(tmp_path / "run", single)


@matrix
def test_bad_input_is_said_at_once_and_not_tried_again(jobs, torchrun, training, tmp_path):
    torchrun(training(tmp_path / "run", "train.global_batch_size=35"))
    codes, output = jobs.wait(60)
    assert 2 in codes, output
    assert "train.global_batch_size = 35 does not divide over 3 processes" in output
    assert "Traceback" not in output


@matrix
def test_names_that_point_to_loopback_do_not_matter(hosts, jobs, torchrun, training, single, tmp_path):
    """Debian's installer gives every host's own name the address 127.0.1.1."""
    hosts.know_each_other(own_name_is_loopback=[1, 2])
    try:
        torchrun(training(tmp_path / "run"))
        codes, output = jobs.wait()
    finally:
        hosts.know_each_other()
    assert codes == [0, 0, 0], output
    assert_same_curve(tmp_path / "run", single)


@matrix
def test_a_lost_host_leaves_a_job_that_goes_on_without_it(hosts, jobs, torchrun, training, single, tmp_path):
    out = tmp_path / "run"
    torchrun(training(out), nodes="2:3")
    wait_until(lambda: (out / "checkpoints" / "latest").exists(), what="the first checkpoint")
    hosts.kill_all(2)
    codes = [process.wait(timeout=240) for process in jobs.started[:2]]
    output = "".join(process.log.read_text(errors="replace") for process in jobs.started)
    assert codes == [0, 0], output
    assert_same_curve(out, single)
