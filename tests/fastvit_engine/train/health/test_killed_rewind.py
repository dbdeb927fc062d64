"""A run that is killed between going back and its next checkpoint: it still leaves out the same samples."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastvit_engine.checkpoint import Recovery
from fastvit_engine.config import load_config
from fastvit_engine.data import prepare_data
from fastvit_engine.distributed.supervise import free_port, rank_environment
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.recovery import load_recovery, save_recovery

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
def start(train_command, bad_key):
    """Starts, as the only rank, a run that the bad sample breaks whenever it comes."""

    def begin(out, resume):
        command = train_command(out, *SETTINGS, resume=resume)
        command = [sys.executable, str(Path(__file__).with_name("faulty_run.py")), *command[3:]]
        faults = json.dumps([{"what": "bad_sample", "key": bad_key}])
        variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "FASTVIT_FAULTS": faults}
        return subprocess.Popen(command, env={**os.environ, **variables, **rank_environment(0, 1, free_port())})

    return begin


def record(run):
    rows, _ = read_metrics(run.metrics)
    return [(row["step"], row["loss"], row["grad_norm"], row["samples_hash"]) for row in rows]


def test_the_decision_outlives_the_process(start, train, tmp_path):
    run = RunFolder(tmp_path / "run")
    process = start(run.path, "never")
    deadline = time.monotonic() + 120
    while not (run.recovery.exists() and load_recovery(run).rewinds):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.0005)
    process.kill()
    process.wait()
    assert (run.checkpoints / "latest").read_text() == "step-00000010"
    manifest = json.loads((run.checkpoints / "step-00000010" / "manifest.json").read_text())
    assert manifest["state"]["skipped"] == []  # it is older than the decision

    with open(run.events, "ab") as file:  # what happens to a log for people does not matter
        file.write(b'{"time": "2026-')
    assert start(run.path, "auto").wait(120) == 0
    recovery = Recovery(skipped=(WINDOW,), failed=(WINDOW,), rewinds=1)
    assert load_recovery(run) == recovery
    manifest = json.loads((run.checkpoints / "step-00000020" / "manifest.json").read_text())
    assert (manifest["state"]["skipped"], manifest["state"]["rewinds"]) == ([list(WINDOW)], 1)

    undisturbed = RunFolder(tmp_path / "undisturbed")
    save_recovery(undisturbed, Recovery(skipped=(WINDOW,)))
    train(undisturbed.path, *SETTINGS)
    assert [event["event"] for event in read_events(undisturbed)].count("anomaly") == 0
    assert record(run) == record(undisturbed)  # to the bit
