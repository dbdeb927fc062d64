"""Runs that faults happen to: each is named, the run goes back, and ends as one that nothing happened to.

What is compared with is a run that was told beforehand to skip the same samples. FASTVIT_TEST_FAULTS=all goes through
every ZeRO stage and precision, and each fault also alone.
"""

import json
import os
import socket
from pathlib import Path

import pytest

from fastvit_engine.checkpoint import Recovery
from fastvit_engine.config import load_config
from fastvit_engine.data import prepare_data
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.recovery import save_recovery
from fastvit_engine.train.step import hash_keys
from tests.fastvit_engine.train.health.faulty_rank import make_faulty
from tests.fastvit_engine.warm_ranks import exit_codes_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BATCH = 32
STEPS = 24
ALL = os.environ.get("FASTVIT_TEST_FAULTS") == "all"
SETTINGS = [
    f"train.duration={STEPS} steps",
    "train.precision=fp32",
    "train.micro_batch_size=8",  # two to a step
    "checkpoint.every=5 steps",
    "model.dropout=0.1",
    "ema.decay=0.9",
    "health.spike_window=10",
    "health.compare_replicas_every=1",
    "health.watch_gradients=true",
    "health.max_rewinds=6",
]
SHARD_EVERYTHING = "deepspeed.zero_optimization={stage3_param_persistence_threshold: 0, reduce_bucket_size: 5000}"
WEIGHT = "blocks.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def keys(digits, tmp_path_factory) -> list[list[str]]:
    """The sample keys of each step of a run that skips nothing."""
    settings = [f"data.train={digits}/train-*.tar", "data.eval=null", f"train.global_batch_size={BATCH}"]
    config = load_config("quickstart", settings).config
    plan = prepare_data(config, world_size=1, index_folder=tmp_path_factory.mktemp("index"))
    batches = plan.train_batches(config, rank=0, world_size=1, micro_batch_size=BATCH, consumed=0, pin_memory=False)
    return [next(batches).keys for _ in range(STEPS + 4)]


@pytest.fixture
def train_with(train_arguments, tmp_path):
    """Runs a training on two processes with faults, to its end; returns exit codes and what was printed."""

    def run(out: Path, faults: list[dict], *settings: str) -> tuple[list[int | None], str]:
        environment = {"FASTVIT_FAULTS": json.dumps(faults)}
        arguments, log = train_arguments(out, *SETTINGS, *settings), tmp_path / "log"
        codes = exit_codes_of(arguments, 2, log, lambda rank: environment, before=make_faulty)
        return codes, log.read_text()

    return run


def the_faults(keys, stage):
    """Each fault, and what `events.jsonl` must say of it, in the order in which they happen."""
    here = [socket.gethostname()]
    bad, loud = keys[3][13], keys[22][5]
    found = [
        # Back to the very beginning: there is no other checkpoint yet.
        (
            {"what": "bad_sample", "key": bad},
            {"kind": "loss", "step": 3, "keys": [bad], "repeats": True, "samples": [3 * BATCH, 4 * BATCH]},
            True,
        ),
        (
            {"what": "weight", "step": 7, "rank": 1},
            {"kind": "weights", "step": 7, "ranks": [1], "hosts": here, "parameters": [WEIGHT]},
            False,
        ),
        (
            {"what": "gradient", "step": 13, "rank": 1},
            {"kind": "gradient", "step": 13, "ranks": [1], "hosts": here, "parameters": [WEIGHT], "repeats": False},
            True,
        ),
        (
            {"what": "bad_gradient", "key": keys[17][0]},
            {"kind": "gradient", "ranks": [0], "parameters": [WEIGHT], "repeats": True},
            True,
        ),
        (
            {"what": "loud_sample", "key": loud, "times": 1e4},
            {"kind": "loss spike", "repeats": True},
            True,
        ),
    ]
    if stage < 3:  # there, no weight of this model has a copy
        flip = {"what": "bit", "step": 11, "rank": 0}
        found.insert(2, (flip, {"kind": "replicas", "step": 11, "ranks": [0, 1]}, False))
    return found


def record(run):
    """Every figure of a run that the machine's speed does not enter."""
    training, _ = read_metrics(run / "metrics.jsonl")
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["samples_hash"]) for row in training]


def events_of(run, kind):
    return [event for event in read_events(RunFolder(run)) if event["event"] == kind]


def check(run, train, tmp_path, keys, expected, settings):
    """The run `run` names what it met, and equals one that skips the same samples and meets nothing."""
    anomalies = events_of(run, "anomaly")
    assert len(anomalies) == len(expected), [event["message"] for event in anomalies]
    for event, (_, facts, _) in zip(anomalies, expected, strict=True):
        assert {name: event[name] for name in facts} == facts, event["message"]
        cause = "hardware suspected" if event["repeats"] is False else "data or numerics"
        assert event["repeats"] is None or cause in event["message"]
    assert len(events_of(run, "rewind")) == len(expected)
    skipped = [event["samples"] for event in events_of(run, "skip")]
    assert skipped == [event["samples"] for event, (_, _, skips) in zip(anomalies, expected, strict=True) if skips]

    # The ledger: the steps of the order but for those that were skipped.
    left = [step for number, step in enumerate(keys) if [number * BATCH, (number + 1) * BATCH] not in skipped]
    assert [row[4] for row in record(run)] == [f"{hash_keys(step):016x}" for step in left[:STEPS]]

    undisturbed = tmp_path / "undisturbed"
    save_recovery(RunFolder(undisturbed), Recovery(skipped=tuple(map(tuple, skipped))))
    train(undisturbed, *SETTINGS, *settings, processes=2)
    assert events_of(undisturbed, "anomaly") == []
    assert record(run) == record(undisturbed)  # to the bit


STAGES = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")] if ALL else [(2, "fp32")]


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_faults_are_named_and_leave_no_trace(train, train_with, keys, tmp_path, stage, precision):
    settings = [f"zero.stage={stage}", f"train.precision={precision}", *([SHARD_EVERYTHING] if stage == 3 else [])]
    expected = the_faults(keys, stage)
    codes, printed = train_with(tmp_path / "run", [fault for fault, _, _ in expected], *settings)
    assert codes == [0, 0], printed
    check(tmp_path / "run", train, tmp_path, keys, expected, settings)
