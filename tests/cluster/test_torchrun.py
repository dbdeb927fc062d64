"""launch/torchrun/run.sh on several hosts."""

import os
import re
import signal

import pytest

from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.run_folder import RunFolder
from tests.cluster.harness import EVERYTHING, LAUNCH, SHARD_EVERYTHING, Jobs, assert_same_curve, losses, ranks, rows
from tests.cluster.hosts import PATIENCE, Hosts, missing, wait_until

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


ELSEWHERE = "launch: ended because of bad input: another node says which"


def error_lines(output):
    return [line for line in output.splitlines() if "fastvit: error:" in line]


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
    torchrun(training(tmp_path / "run", "train.global_batch_size=2"))
    codes, output = jobs.wait()
    assert codes == [2, 2, 2], output
    (line,) = error_lines(output)
    assert "train.global_batch_size is 2, fewer images than the 3 processes" in line
    assert output.splitlines().count(ELSEWHERE) == 2
    assert not re.search(r"Traceback|exitcode|Exception raised from", output)


@matrix
def test_a_host_that_lacks_a_file_is_named_once(hosts, jobs, training, tmp_path):
    arguments = training(tmp_path / "run")
    for host in range(3):
        common = ["--head", hosts.name(0), "--nodes", "3", "--processes-per-node", "2"]
        jobs.start(host, [*RUN, *common, "--", "here.yaml" if host == 1 else arguments[0], *arguments[1:]])
    codes, output = jobs.wait()
    assert codes == [2, 2, 2], output
    (line,) = error_lines(output)
    assert re.search(r"error: ranks \d, \d on node-1: .*here.yaml", line)


@matrix
@pytest.mark.timeout(1800)
def test_an_elastic_job_trains_any_batch_on_any_number_of_hosts(training, environment, pace, tmp_path):
    """32 images on 4 hosts, on 3 and again on 4: 8 images each; 11, 11 and 10; 8 each.

    However slow the machine is, hosts leave and come only while the job waits for them.
    """
    out, settings = tmp_path / "run", ["train.global_batch_size=32", "train.duration=40 steps", "train.log_every=1"]
    if reason := missing():
        pytest.skip(reason)
    with Hosts(4) as hosts:
        jobs = Jobs(hosts, tmp_path, environment)

        def start(host, arguments, nodes):
            common = ["--head", hosts.name(0), "--nodes", nodes, "--processes-per-node", "1", "--max-restarts", "9"]
            return jobs.start(host, [*RUN, *common, "--", *arguments])

        def train_on(size):
            """Four steps on so many hosts; then the job waits."""
            started = f"a start on {size} hosts"
            wait_until(lambda: sizes_of(out)[-1:] == [size], what=started)
            steps = steps_done(out) + 4
            pace(steps)
            wait_until(lambda: steps_done(out) == steps, what=f"{steps} steps, the last on {size} hosts")

        try:
            alone = start(0, training(tmp_path / "alone", *settings), "1")
            assert alone.wait(timeout=PATIENCE) == 0, alone.log.read_text()
            pace(0)
            elastic = training(out, *settings, "checkpoint.every=3 steps")
            first = [start(host, elastic, "3:4") for host in range(4)]
            train_on(4)
            hosts.kill_all(3)
            train_on(3)
            running = [*first[:3], start(3, elastic, "3:4")]
            train_on(4)
            pace(10**9)
            codes = [process.wait(timeout=PATIENCE) for process in running]
            assert codes == [0] * 4, "".join(process.log.read_text(errors="replace") for process in running)
        finally:
            jobs.close()
    assert sizes_of(out)[-3:] == [4, 3, 4]  # it may have begun on three, if the fourth was late
    assert_same_curve(out, losses(tmp_path / "alone"))


def sizes_of(out):
    """The number of processes of each start of a run, without repetitions."""
    if not (run := RunFolder(out)).events.exists():
        return []
    sizes = [event["world_size"] for event in read_events(run) if event["event"] == "start"]
    return [size for number, size in enumerate(sizes) if number == 0 or size != sizes[number - 1]]


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
    codes = [process.wait(timeout=PATIENCE) for process in jobs.started[:2]]
    output = "".join(process.log.read_text(errors="replace") for process in jobs.started)
    assert codes == [0, 0], output
    assert_same_curve(out, single)
