"""What the tests of this folder share: where things are, how a curve is compared, and jobs on several hosts."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from fastvit_engine.observe.metrics import read_metrics
from tests.cluster.hosts import PATIENCE

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
EVERYTHING = os.environ.get("FASTVIT_TEST_CLUSTER") == "all"  # every stage and number of processes, minutes

STEPS = 12
# Tiny parameters stay whole under ZeRO-3 by default, and buckets hold all of them: make the machinery work.
SHARD_EVERYTHING = "deepspeed.zero_optimization={stage3_param_persistence_threshold: 0, reduce_bucket_size: 5000}"


def rows(out):
    return read_metrics(out / "metrics.jsonl")[0]


def losses(out):
    return [(row["step"], row["samples_hash"], row["loss"]) for row in rows(out)]


def assert_same_curve(out, expected):
    """The same samples in each step, and the same losses but for the order of sums in fp32."""
    seen = losses(out)
    assert [row[:2] for row in seen] == [row[:2] for row in expected]
    assert [row[2] for row in seen] == pytest.approx([row[2] for row in expected], abs=1e-6)


def ranks(hosts, host):
    """The processes of a host that train."""
    return [process for process in hosts.processes(host) if b"fastvit_engine\0train" in command_line(process)]


def command_line(process):
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""
    return b"" if b"agent.py" in words or b"run.sh" in words else words


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

    def wait(self, seconds=PATIENCE):
        """The exit codes of all, and what they wrote."""
        codes = [process.wait(timeout=seconds) for process in self.started]
        return codes, "".join(process.log.read_text(errors="replace") for process in self.started)

    def close(self):
        """Also prints the end of each log, which is shown if the test failed."""
        for process in self.started:
            print(f"---- {process.log.name}\n{process.log.read_text(errors='replace')[-3000:]}")
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for host in range(self.hosts.count):
            for rank in ranks(self.hosts, host):  # which has a session of its own, and may be another host's
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
            self.hosts.mend(host)
