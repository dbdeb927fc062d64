"""A run on two nodes: after a killed rank, and after a lost node, all continue from memory with the record of one run.

Ranks are forked here, and the test holds the memory of both nodes, as their agents would: tests/cluster has those.
"""

import io
import signal
import tarfile

import pytest

from fastvit_engine.checkpoint.in_memory import Holder, can_hold
from fastvit_engine.distributed import rendezvous
from fastvit_engine.files import read_json_lines
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.observe.run_folder import RunFolder
from tests.fastvit_engine.warm_ranks import exit_codes_of, run_ranks
from tests.in_full import in_full

pytestmark = [
    pytest.mark.skipif(not can_hold(), reason="needs Linux's memfd_create"),
    pytest.mark.slow,
    pytest.mark.distributed,
]
SHARD_EVERYTHING = "deepspeed.zero_optimization={stage3_param_persistence_threshold: 0, reduce_bucket_size: 5000}"
# What has a state of its own; and one row in the middle, so that each rank has counted what nobody else knows.
SETTINGS = [
    "train.precision=fp32",
    "model.dropout=0.1",
    "ema.decay=0.9",
    "data.max_bad_share=0.5",
    "train.log_every=20",
]
KILLED_IN = 17  # the forward pass; with no row before, nothing depends on how long steps take: each has its copy


def on_loopback():
    """Rank 0 of the other node is here, too."""
    rendezvous.check_rendezvous = lambda: None


@pytest.fixture
def spoiled(digits, tmp_path):
    """The digits, every seventh of which is no image."""
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for shard in sorted(digits.glob("train-*.tar")):
        with tarfile.open(shard) as source, tarfile.open(folder / shard.name, "w") as target:
            for number, member in enumerate(source):
                content = source.extractfile(member).read()
                if not member.name.endswith(".cls") and number % 7 == 0:
                    content = b"no image"
                member.size = len(content)
                target.addfile(member, io.BytesIO(content))
    return folder


class Nodes:
    """Two nodes of one process each."""

    def __init__(self):
        self.holders = [Holder(1, guests=True) for _ in range(2)]

    def lose(self, node):
        self.holders[node].close()
        self.holders[node] = Holder(1, guests=True)

    def environment_of(self, rank):
        return {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **self.holders[rank].environment_of_node}

    def close(self):
        for holder in self.holders:
            holder.close()


@pytest.fixture
def nodes(monkeypatch):
    monkeypatch.setenv("FASTVIT_RUN_ID", "the same job")
    two = Nodes()
    yield two
    two.close()


def starts(run):
    return [event["step"] for event in read_events(run) if event["event"] == "start"]


def record(folder):
    rows, _ = read_metrics(folder / "metrics.jsonl")
    keys = ("step", "samples", "loss", "grad_norm", "lr", "samples_hash", "flops", "bad_samples")
    return [tuple(row[key] for key in keys) for row in rows]


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def named(folder):
    return sorted(map(str, read_json_lines(folder / "bad_samples.jsonl")))


@pytest.mark.parametrize(("stage", "lost"), [(1, 1), in_full(0, 0), in_full(1, None), in_full(2, 0), in_full(3, 1)])
def test_a_killed_rank_and_a_lost_node_cost_one_step_and_change_nothing(
    nodes, train_arguments, spoiled, tmp_path, monkeypatch, stage, lost
):
    settings = [*SETTINGS, f"data.train={spoiled}/train-*.tar", f"zero.stage={stage}", "train.duration=24 steps"]
    settings += ["train.objective=tests.fastvit_engine.train.killing:Killing"]
    settings += [SHARD_EVERYTHING] if stage == 3 else []
    run, log = RunFolder(tmp_path / "run"), tmp_path / "log"

    def train(resume):
        arguments = train_arguments(run.path, *settings, "checkpoint.in_memory=true", resume=resume)
        return exit_codes_of(arguments, 2, log, nodes.environment_of, before=on_loopback)

    monkeypatch.setenv("FASTVIT_TEST_KILL", f"1 {KILLED_IN} {tmp_path / 'killed'}")
    assert train("never")[1] == -signal.SIGKILL, log.read_text()
    if lost is not None:
        nodes.lose(lost)
    assert train("auto") == [0, 0], log.read_text()
    assert "a copy in memory" in log.read_text()
    killed_after = KILLED_IN - 1
    assert starts(run)[1:] in ([killed_after], [killed_after - 1])

    undisturbed = tmp_path / "undisturbed"
    arguments = train_arguments(undisturbed, *settings, "checkpoint.in_memory=false")
    assert run_ranks(arguments, 2, log), log.read_text()
    assert record(run.path) == record(undisturbed) and record(undisturbed)[-1][-1] > record(undisturbed)[0][-1]
    assert named(run.path) == named(undisturbed)
    assert weights(run.path) == weights(undisturbed) and len(weights(undisturbed)) == 2
