"""launch/torchrun/run.sh with checkpoint.in_memory=true: each node's copies are also in the memory of the next one."""

import os
import signal

import pytest

from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.observe.run_folder import RunFolder
from tests.cluster.harness import LAUNCH, SHARD_EVERYTHING, ranks, rows
from tests.cluster.hosts import wait_until
from tests.cluster.test_torchrun import matrix
from tests.fastvit_engine.warm_ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# What has a state of its own; and no checkpoint but the first, so that nothing else can be continued from.
SETTINGS = ["checkpoint.in_memory=true", "checkpoint.every=null", "ema.decay=0.9", "model.dropout=0.1"]
STEPS = 14


@pytest.fixture
def launch(hosts, jobs, training, tmp_path):
    """launch(host, *settings, out=...): run.sh on this host, of two nodes with two processes each."""

    def start(host, *settings, nodes=2):
        options = ["--head", hosts.name(0), "--nodes", str(nodes), "--processes-per-node", "2", "--max-restarts", "2"]
        arguments = training(tmp_path / "run", *SETTINGS, f"train.duration={STEPS} steps", *settings)
        return jobs.start(host, ["bash", str(LAUNCH / "torchrun" / "run.sh"), *options, "--", *arguments])

    return start


def starts(out):
    return [event["step"] for event in read_events(RunFolder(out)) if event["event"] == "start"]


def steps_done(out):
    return len(rows(out)) if (out / "metrics.jsonl").exists() else 0


def record(out):
    keys = ("step", "samples", "loss", "grad_norm", "lr", "samples_hash", "flops")
    return [tuple(row[key] for key in keys) for row in read_metrics(out / "metrics.jsonl")[0]]


def weights(out):
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


@pytest.fixture
def undisturbed(training, tmp_path):
    """The same run in as many processes, to which nothing happens."""

    def run(*settings):
        out, log = tmp_path / "undisturbed", tmp_path / "undisturbed.log"
        alone = [*SETTINGS, f"train.duration={STEPS} steps", *settings, "checkpoint.in_memory=false"]
        assert run_ranks(["train", *training(out, *alone)], 4, log), log.read_text()
        return out

    return run


@matrix
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_killed_rank_and_then_a_lost_node_cost_a_step_each_and_change_nothing(
    hosts, jobs, launch, pace, undisturbed, tmp_path, stage
):
    out = tmp_path / "run"
    settings = [f"zero.stage={stage}", *([SHARD_EVERYTHING] if stage == 3 else [])]
    pace(5)
    launch(0, *settings)
    launch(1, *settings)
    wait_until(lambda: steps_done(out) == 5, what="five steps")
    os.kill(ranks(hosts, 1)[0], signal.SIGKILL)
    wait_until(lambda: len(starts(out)) == 2, what="the second start")
    assert starts(out)[1] in (4, 5)
    pace(10)
    wait_until(lambda: steps_done(out) == 10, what="ten steps")
    for process in hosts.processes(1):
        os.kill(process, signal.SIGKILL)
    launch(1, *settings)  # which finds nothing in its memory
    pace(10**9)
    codes, output = jobs.wait()
    assert codes[0] == codes[2] == 0, output
    assert starts(out)[2] in (9, 10)
    assert output.count("a copy in memory") == 2
    alone = undisturbed(*settings)
    assert record(out) == record(alone)
    assert weights(out) == weights(alone) and len(weights(out)) == 2
