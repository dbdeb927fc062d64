"""A run that is killed between going back and its next checkpoint: it still leaves out the same samples."""

import json
import os
import signal

import pytest

from fastvit_engine.checkpoint import Recovery
from fastvit_engine.config import load_config
from fastvit_engine.data import prepare_data
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.health import rewind
from fastvit_engine.train.recovery import load_recovery, save_recovery
from tests.fastvit_engine.train.health.faulty_rank import make_faulty
from tests.fastvit_engine.warm_ranks import exit_codes_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BATCH = 32
SETTINGS = ["train.duration=20 steps", "train.precision=fp32", "checkpoint.every=5 steps", "model.dropout=0.1"]
WINDOW = (13 * BATCH, 14 * BATCH)


@pytest.fixture(scope="module")
def bad_key(digits, tmp_path_factory):
    """A sample of the fourteenth step, after two checkpoints."""
    settings = [f"data.train={digits}/train-*.tar", "data.eval=null", f"train.global_batch_size={BATCH}"]
    config = load_config("quickstart", settings).config
    data = prepare_data(config, world_size=1, index_folder=tmp_path_factory.mktemp("index"))
    first, _ = WINDOW
    batches = data.train_batches(config, rank=0, world_size=1, micro_batch_size=BATCH, consumed=first, pin_memory=False)
    return next(batches).keys[3]


@pytest.fixture
def train_with_it(train_arguments, bad_key, tmp_path):
    """Runs, as the only rank, a training that the bad sample breaks whenever it comes; returns the exit code."""

    def run(out, resume, before=make_faulty):
        environment = {"FASTVIT_FAULTS": json.dumps([{"what": "bad_sample", "key": bad_key}])}
        arguments = train_arguments(out, *SETTINGS, resume=resume)
        (code,) = exit_codes_of(arguments, 1, tmp_path / "log", lambda rank: environment, before=before)
        return code

    return run


def kill_when_decided():
    """The rank kills itself once it has written down what it will leave out."""
    make_faulty()
    save = rewind.save_recovery

    def save_and_die(*arguments):
        save(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    rewind.save_recovery = save_and_die


def record(run):
    rows, _ = read_metrics(run.metrics)
    return [(row["step"], row["loss"], row["grad_norm"], row["samples_hash"]) for row in rows]


def test_the_decision_outlives_the_process(train_with_it, train, tmp_path):
    run = RunFolder(tmp_path / "run")
    assert train_with_it(run.path, "never", kill_when_decided) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert load_recovery(run).rewinds == 1
    assert (run.checkpoints / "latest").read_text() == "step-00000010"
    manifest = json.loads((run.checkpoints / "step-00000010" / "manifest.json").read_text())
    assert manifest["state"]["skipped"] == []  # it is older than the decision

    with open(run.events, "ab") as file:  # what happens to a log for people does not matter
        file.write(b'{"time": "2026-')
    assert train_with_it(run.path, "auto") == 0, (tmp_path / "log").read_text()
    recovery = Recovery(skipped=(WINDOW,), failed=(WINDOW,), rewinds=1)
    assert load_recovery(run) == recovery
    manifest = json.loads((run.checkpoints / "step-00000020" / "manifest.json").read_text())
    assert (manifest["state"]["skipped"], manifest["state"]["rewinds"]) == ([list(WINDOW)], 1)

    undisturbed = RunFolder(tmp_path / "undisturbed")
    save_recovery(undisturbed, Recovery(skipped=(WINDOW,)))
    train(undisturbed.path, *SETTINGS)
    assert [event["event"] for event in read_events(undisturbed)].count("anomaly") == 0
    assert record(run) == record(undisturbed)  # to the bit
