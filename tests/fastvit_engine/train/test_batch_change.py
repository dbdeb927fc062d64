"""A run whose global batch is changed on purpose when it resumes."""

import json

import pytest

from fastvit_engine.checkpoint import Manifest
from fastvit_engine.cli import main
from fastvit_engine.distributed import launch
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.observe.run_folder import RunFolder
from tests.fastvit_engine.warm_ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

COMMON = ["train.precision=fp32", "schedule.warmup=1 step", "checkpoint.every=4 steps"]


@pytest.fixture
def change(train_arguments, tmp_path):
    """Resumes a run with another batch: `change(out, *settings, processes=3)`."""

    def resume(out, *settings, processes):
        arguments = [*train_arguments(out, *COMMON, *settings, resume="auto"), "--allow-batch-change"]
        log = tmp_path / "log"
        assert run_ranks(arguments, processes, log), log.read_text()

    return resume


def test_the_launcher_hands_the_permission_on(train, train_arguments, tmp_path, monkeypatch):
    """A restart after a failure may resume from a checkpoint of the batch before."""
    commands = []
    monkeypatch.setattr(launch, "run_with_restarts", lambda command, *rest: commands.append(command) or 0)
    out = train(tmp_path / "run", *COMMON, "train.duration=4 steps")
    arguments = train_arguments(out, *COMMON, "train.global_batch_size=48", resume="auto")
    assert main(arguments) == 2
    assert main([*arguments, "--allow-batch-change"]) == 0
    (command,) = commands
    assert "--allow-batch-change" in command


def test_a_batch_changed_at_a_resume_takes_the_next_samples_of_the_order(train, change, tmp_path):
    """16 steps of 32 images, then 8 of 64: the hashes of the latter are sums of those of 16 more of the former."""
    out, settings = tmp_path / "run", ["train.duration=1024 samples", "schedule.kind=cosine"]
    unchanged, _ = read_metrics(train(tmp_path / "unchanged", *COMMON, *settings) / "metrics.jsonl")
    train(out, *COMMON, "train.duration=16 steps", processes=2)
    change(out, *settings, "train.global_batch_size=64", processes=3)
    rows, _ = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert [row["samples"] for row in rows] == [*range(32, 513, 32), *range(576, 1025, 64)]
    assert [row["samples_hash"] for row in rows[:16]] == [row["samples_hash"] for row in unchanged[:16]]
    for step in range(8):
        parts = [int(row["samples_hash"], 16) for row in unchanged[16 + 2 * step :][:2]]
        assert int(rows[16 + step]["samples_hash"], 16) == sum(parts) % 2**64
        # In epochs or samples the schedule is one of samples.
        assert rows[16 + step]["lr"] == pytest.approx(unchanged[16 + 2 * step]["lr"])
        assert rows[16 + step]["epoch"] == pytest.approx(unchanged[17 + 2 * step]["epoch"])
    (event,) = [event for event in read_events(RunFolder(out)) if event["event"] == "batch_change"]
    assert (event["step"], event["before"], event["after"], event["total_steps"]) == (16, 32, 64, 24)
    manifest = Manifest.from_json((out / "checkpoints" / "step-00000024" / "manifest.json").read_bytes(), "manifest")
    assert manifest.state.consumed == 1024
    assert manifest.state.batch_sizes == ((0, 32), (16, 64))

    # From then on it is the run's batch, and nothing has to be allowed.
    longer = [*COMMON, "train.duration=26 steps", "train.global_batch_size=64"]
    train(out, *longer, resume="auto")
    rows, _ = read_metrics(out / "metrics.jsonl")
    assert (rows[-1]["step"], rows[-1]["samples"]) == (26, 1024 + 128)
    assert len([event for event in read_events(RunFolder(out)) if event["event"] == "batch_change"]) == 1
    assert json.loads((out / "environment.json").read_text())["global_batch_size"] == 64
