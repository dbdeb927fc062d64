"""launch/slurm/train.sbatch in a SLURM cluster of its own."""

import json
import os
import signal
from pathlib import Path

import pytest

import tests.cluster.slurm as slurm_cluster
from tests.cluster.harness import EVERYTHING, LAUNCH, REPOSITORY, SHARD_EVERYTHING, assert_same_curve
from tests.cluster.hosts import wait_until
from tests.cluster.slurm import Slurm

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = str(LAUNCH / "slurm" / "train.sbatch")
# Before the file's own #SBATCH lines: hosts without GPUs, and a short limit.
HERE = ["--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]
matrix = pytest.mark.skipif(not EVERYTHING, reason="the whole matrix takes minutes: FASTVIT_TEST_CLUSTER=all")


@pytest.fixture(scope="module")
def slurm(hosts):
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    cluster = Slurm(hosts)
    yield cluster
    cluster.close()


@pytest.fixture
def submit(slurm, environment, tmp_path):
    """Submits a training; returns the job's number."""

    def run(*arguments, nodes=3, tasks=1):
        command = [
            "sbatch",
            "--parsable",
            f"--chdir={tmp_path}",
            *HERE,
            f"--nodes={nodes}",
            f"--ntasks-per-node={tasks}",
        ]
        variables = {**environment, "FASTVIT_HOME": str(REPOSITORY)}
        done = slurm.run(*command, SCRIPT, *arguments, env=variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture
def logs(tmp_path):
    def read(job):
        files = [tmp_path / f"fastvit-{job}.log", *sorted((tmp_path / f"fastvit-{job}").glob("*.log"))]
        return "\n".join(file.read_text(errors="replace") for file in files if file.exists())

    return read


def wait_for_end(slurm, job, logs):
    over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
    try:
        wait_until(lambda: slurm.state(job) in over, what="the end of the job")
    finally:
        print(logs(job))
    return slurm.state(job)


def test_asked_to_leave_the_job_goes_back_into_the_queue_and_on(slurm, submit, logs, training, single, tmp_path):
    """The signal that SLURM sends before the time limit, sent by hand."""
    out = tmp_path / "run"
    job = submit("--", *training(out), nodes=2)
    wait_until(lambda: (out / "checkpoints" / "latest").exists(), what="the first checkpoint")
    assert slurm.run("scancel", "--batch", "--signal=USR1", job).returncode == 0
    assert wait_for_end(slurm, job, logs) == "COMPLETED", logs(job)
    assert "stopped on request: back into the queue, for the time number 1 of at most 20" in logs(job)
    assert {path.name for path in (tmp_path / f"fastvit-{job}").iterdir()} == {f"node-{n}.log" for n in range(2)}
    assert_same_curve(out, single)


@matrix
def test_bad_input_ends_the_job_at_once(slurm, submit, logs, training, tmp_path):
    job = submit("--", *training(tmp_path / "run", "train.global_batch_size=2"))
    assert wait_for_end(slurm, job, logs) == "FAILED"
    (line,) = [line for line in logs(job).splitlines() if "fastvit: error:" in line]
    assert "train.global_batch_size is 2, fewer images than the 3 processes" in line
    assert "restart" not in logs(job)


def test_slurm_accepts_the_script_as_it_is(slurm, environment):
    """Its own #SBATCH lines, but for the GPUs, which the cluster does not have."""
    options = ["--test-only", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=4"]
    done = slurm.run("sbatch", *options, SCRIPT, "--", "vit_b16_i21k", "--out", "run", env=environment)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


@matrix
def test_doctor_as_a_step_needs_no_address_and_reports_once(slurm, environment, tmp_path):
    """As docs/doctor.md starts it: srun sets no MASTER_ADDR."""
    command = ["srun", "--nodes=2", "--ntasks-per-node=2", f"--chdir={tmp_path}", "python", "-m", "fastvit_engine"]
    without = {name: value for name, value in environment.items() if not name.startswith("MASTER_")}
    done = slurm.run(*command, "doctor", "--json", env=without, timeout=400)
    report = json.loads(done.stdout)  # one alone, and nothing beside it
    found = {one["subject"]: one for one in report["findings"] if one["group"] == "links"}
    assert report["hosts"] == ["node-0", "node-1"], done.stderr
    assert found["all-reduce"]["found"].endswith("by Gloo on 4 processes of 2 nodes (bus bandwidth)")
    assert found["between nodes"]["status"] == "ok"
    assert (done.returncode == 0) == (report["problems"] == 0), done.stderr


@matrix
def test_a_killed_rank_is_restarted_in_the_same_allocation(slurm, submit, logs, training, single, tmp_path):
    out = tmp_path / "run"
    job = submit("--", *training(out))
    wait_until(lambda: (out / "checkpoints" / "latest").exists(), what="the first checkpoint")
    victims = [
        process
        for process in slurm.hosts.processes(1)
        if Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[1:4] == [b"-m", b"fastvit_engine", b"train"]
    ]
    assert len(victims) == 1
    os.kill(victims[0], signal.SIGKILL)
    assert wait_for_end(slurm, job, logs) == "COMPLETED", logs(job)
    assert "restart 1 of 3" in logs(job)
    assert_same_curve(out, single)


@matrix
@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_on_three_hosts(slurm, submit, logs, training, single, tmp_path, stage, tasks):
    settings = [f"zero.stage={stage}", *([SHARD_EVERYTHING] if stage == 3 else [])]
    job = submit("--", *training(tmp_path / "run", *settings), tasks=tasks)
    assert wait_for_end(slurm, job, logs) == "COMPLETED", logs(job)
    assert_same_curve(tmp_path / "run", single)
