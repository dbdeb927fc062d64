"""A tiny run on real digit scans, started on several hosts as users start it: with the scripts of `launch/`."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import Hosts, missing

from fastvit_engine.data.make import make_dataset
from fastvit_engine.observe.metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
EVERYTHING = os.environ.get("FASTVIT_TEST_CLUSTER") == "all"  # every stage and number of processes, minutes

STEPS = 12
# Tiny parameters stay whole under ZeRO-3 by default, and buckets hold all of them: make the machinery work.
SHARD_EVERYTHING = "deepspeed.zero_optimization={stage3_param_persistence_threshold: 0, reduce_bucket_size: 5000}"


@pytest.fixture(scope="session")
def hosts():
    """Three hosts on a network of their own."""
    if reason := missing():
        pytest.skip(reason)
    with Hosts(3) as three:
        yield three


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    make_dataset("digits", folder, eval_fraction=0.2, samples_per_shard=200, seed=0, progress=lambda text: None)
    return folder


@pytest.fixture(scope="session")
def training(digits):
    """What stands behind `fastvit train`: `training(out, "zero.stage=3")`."""

    def arguments(out, *settings):
        everything = [
            f"data.train={digits}/train-*.tar",
            "data.eval=null",
            "data.num_workers=0",
            "model={name: Ti/4, num_classes: 10, image_size: 8, width: 32, depth: 2, heads: 2}",
            f"train={{duration: {STEPS} steps, global_batch_size: 36, log_every: 1, precision: fp32}}",
            "schedule.warmup=2 steps",
            "evaluate.every=null",
            "checkpoint.every=4 steps",
            *settings,
        ]
        return ["quickstart", *(word for setting in everything for word in ("--set", setting)), "--out", str(out)]

    return arguments


@pytest.fixture(scope="session")
def environment():
    """Of every process on every host: one thread each, no GPU, this working tree."""
    path = f"{REPOSITORY}:{REPOSITORY}/kernels"
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": path,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@pytest.fixture(scope="session")
def single(training, environment, tmp_path_factory):
    """The losses of the run in a single process."""
    out = tmp_path_factory.mktemp("single") / "run"
    command = [sys.executable, "-m", "fastvit_engine", "train", *training(out, "zero.stage=0")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return losses(out)


def rows(out):
    return read_metrics(out / "metrics.jsonl")[0]


def losses(out):
    return [(row["step"], row["samples_hash"], row["loss"]) for row in rows(out)]


def assert_same_curve(out, expected):
    """The same samples in each step, and the same losses but for the order of sums in fp32."""
    seen = losses(out)
    assert [row[:2] for row in seen] == [row[:2] for row in expected]
    assert [row[2] for row in seen] == pytest.approx([row[2] for row in expected], abs=1e-6)


class Jobs:
    """Commands that run on hosts at the same time, each with a log; all dead when the test ends."""

    def __init__(self, hosts, folder, environment):
        self.hosts, self.folder, self.environment = hosts, folder, environment
        self.started = []

    def start(self, host, command, **variables):
        log = self.folder / f"{len(self.started)}-{self.hosts.name(host)}.log"
        with open(log, "wb") as file:
            process = self.hosts.start(
                host, command, env={**self.environment, **variables}, stdout=file, stderr=subprocess.STDOUT
            )
        process.log = log
        self.started.append(process)
        return process

    def wait(self, seconds=240):
        """The exit codes of all, and what they wrote."""
        codes = [process.wait(timeout=seconds) for process in self.started]
        return codes, "".join(process.log.read_text(errors="replace") for process in self.started)

    def close(self):
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for host in range(self.hosts.count):
            self.hosts.mend(host)


@pytest.fixture
def jobs(hosts, tmp_path, environment):
    running = Jobs(hosts, tmp_path, environment)
    yield running
    running.close()
