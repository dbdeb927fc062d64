"""A run whose folder is in an object store: interrupted on one machine, and continued on others bit for bit.

FASTVIT_TEST_BUCKETS=all interrupts it more often, and in more ways.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from fastvit_engine import load_model
from fastvit_engine.checkpoint.records import Records
from fastvit_engine.cli import main
from fastvit_engine.config import load_config
from fastvit_engine.data import prepare_data
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.observe.run_folder import RunFolder, run_folder
from tests.fastvit_engine.train.interrupted_rank import interrupt
from tests.fastvit_engine.warm_ranks import exit_codes_of, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 20
SETTINGS = [f"train.duration={STEPS} steps", "train.precision=fp32", "checkpoint.every=10 steps"]
BATCH = 32
ALL = os.environ.get("FASTVIT_TEST_BUCKETS") == "all"
only_all = pytest.mark.skipif(not ALL, reason="FASTVIT_TEST_BUCKETS=all interrupts runs in more ways")


def record(metrics):
    """Every figure of a run that the machine's speed does not enter."""
    training, evaluations = read_metrics(metrics)
    steps = [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["samples_hash"]) for row in training]
    return steps, [(row["step"], row["eval"], row["top1"], row["loss"]) for row in evaluations]


def fetched(url, folder):
    """The run as a machine finds it that has never seen it."""
    run = RunFolder(folder, url)
    Records(run).fetch()
    return run


@pytest.fixture
def url(s3_bucket, tmp_path):
    yield f"s3://bucket/{tmp_path.name}/run"
    s3_bucket.rm(f"bucket/{tmp_path.name}/")


@pytest.fixture(scope="module")
def bad_sample(digits, tmp_path_factory):
    """The key of a sample of the fifth step."""
    settings = [f"data.train={digits}/train-*.tar", "data.eval=null", f"train.global_batch_size={BATCH}"]
    config = load_config("quickstart", settings).config
    data = prepare_data(config, world_size=1, index_folder=tmp_path_factory.mktemp("index"))
    start = {"rank": 0, "world_size": 1, "micro_batch_size": BATCH, "consumed": 4 * BATCH, "pin_memory": False}
    return next(data.train_batches(config, **start)).keys[3]


@pytest.fixture
def start(train_arguments, tmp_path, bad_sample):
    """start(out, machine, **what happens) -> (exit code, what it printed); as a job of one rank."""

    def begin(out, machine="", **plan):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        environment = {
            "FASTVIT_RUNS": str(tmp_path / f"machine-{machine}"),
            "FASTVIT_INTERRUPTION": json.dumps({"bad_sample": bad_sample, **plan}),
        }
        arguments = train_arguments(out, *SETTINGS, resume="auto")
        (code,) = exit_codes_of(arguments, 1, log, lambda rank: environment, before=interrupt)
        return code, log.read_text()

    return begin


def test_killed_and_continued_on_other_machines(start, url, tmp_path):
    """A sample whose loss is NaN makes each run go back, also the one that nothing else happens to."""
    code, text = start(tmp_path / "undisturbed")
    assert code == 0, text
    undisturbed = RunFolder(tmp_path / "undisturbed")

    code, text = start(url, "a", step=13, signal=signal.SIGKILL, published="step-00000010")
    assert code == -signal.SIGKILL, text
    assert f"starting {url}: 20 steps" in text and f"working folder: {tmp_path}/machine-a/" in text
    seen = fetched(url, tmp_path / "seen")
    steps = [row[0] for row in record(seen.metrics)[0]]
    assert steps == list(range(1, len(steps) + 1))
    assert 10 <= len(steps) <= 13  # later steps may be uploaded with those of the checkpoint: training does not wait
    assert json.loads(seen.recovery.read_text())["rewinds"] == 1

    if ALL:
        code, text = start(url, "b", step=16, signal=signal.SIGTERM, published="step-00000010")
        assert code == 76, text
        assert f"saved {url}/checkpoints/step-00000018; the same command with --resume auto continues" in text
        events = read_events(fetched(url, tmp_path / "seen"))
        assert (events[-1]["event"], events[-1]["reason"]) == ("stop", "preempted")

    code, text = start(url, "c")
    assert code == 0, text
    assert f"continuing {url} from step {18 if ALL else 10} of 20" in text
    assert f"finished {url}" in text and f"next: fastvit report {url}" in text
    seen = fetched(url, tmp_path / "seen")
    assert record(seen.metrics) == record(undisturbed.metrics)  # to the bit
    assert seen.recovery.read_bytes() == undisturbed.recovery.read_bytes()
    kinds = [event["event"] for event in read_events(seen)]
    assert (kinds.count("start"), kinds.count("rewind"), kinds[-1]) == (2 + ALL, 1, "stop")
    (working,) = (tmp_path / "machine-c").iterdir()
    for name in ("config.yaml", "metrics.jsonl", "events.jsonl", "recovery.json", "configs/config-0001.yaml"):
        assert (working / name).read_bytes() == (seen.path / name).read_bytes(), name

    ours, theirs = load_model(Path(url)).state_dict(), load_model(undisturbed.path).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@only_all
def test_a_finished_run_is_exported_and_reported_and_left_alone(
    start, url, s3_bucket, train_arguments, tmp_path, monkeypatch, capsys
):
    code, text = start(url)
    assert code == 0, text
    weights = f"{url.removeprefix('s3://')}/model.safetensors"
    assert main(["export", url, "--out", str(tmp_path / "weights.safetensors")]) == 0
    exported = (tmp_path / "weights.safetensors").read_bytes()
    assert s3_bucket.cat_file(weights) == exported
    capsys.readouterr()
    assert main(["report", url]) == 0
    assert f"report: {url}/report.html" in capsys.readouterr().out
    assert s3_bucket.cat_file(f"{url.removeprefix('s3://')}/report.html").startswith(b"<!DOCTYPE html>")

    # The finished run again, by the launcher and on another machine: nothing is uploaded but what is damaged.
    monkeypatch.setenv("FASTVIT_RUNS", str(tmp_path / "later"))
    monkeypatch.setattr("fastvit_engine.checkpoint.remote._SETTLE_SECONDS", 0.0)
    arguments = train_arguments(url, *SETTINGS, resume="auto")
    bucket, _, key = weights.partition("/")
    before = s3_bucket.client.head_object(Bucket=bucket, Key=key)
    assert main(arguments) == 0
    assert f"{url} is complete, with 20 steps" in capsys.readouterr().out
    assert before["LastModified"] == s3_bucket.client.head_object(Bucket=bucket, Key=key)["LastModified"]
    assert not list(run_folder(url).path.glob("*.safetensors"))
    for damage in (b"", bytes(8)):
        s3_bucket.pipe_file(weights, damage)
        assert main(arguments) == 0
        assert s3_bucket.cat_file(weights) == exported

    # Without --resume, a folder that holds a run is refused, wherever it is.
    assert main(train_arguments(url, *SETTINGS)) == 2
    assert f"{url} already holds a run: add --resume auto" in capsys.readouterr().err


@only_all
def test_a_checkpoint_whose_records_cannot_be_uploaded_is_not_published(start, url, s3_bucket, tmp_path):
    code, text = start(url, "a", step=13, signal=signal.SIGTERM, store_refuses="metrics.jsonl", bad_sample="")
    assert code == 75, text
    assert f"checkpoint {url}/checkpoints/step-00000010 could not be written ({url}: no answer)" in text
    place = f"{url.removeprefix('s3://')}/checkpoints"
    assert {path.split("/")[-2] for path in s3_bucket.find(f"{place}/step-")} == {"step-00000000"}
    assert not fetched(url, tmp_path / "seen").metrics.exists()


def start_and_kill(command, rows, metrics):
    """Starts a run, and kills all of it once it has written so many rows."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    parent = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("samples_hash") >= rows):
        assert parent.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.001)
    parent.send_signal(signal.SIGKILL)
    parent.wait()


@only_all
def test_a_killed_launcher_is_continued_on_two_machines_that_have_never_seen_the_run(
    train, train_arguments, train_command, digits, url, s3_bucket, tmp_path, monkeypatch
):
    settings = [*SETTINGS, "checkpoint.every=5 steps", "evaluate.every=10 steps", f"data.eval={digits}/eval-*.tar"]
    undisturbed = train(tmp_path / "undisturbed", *settings, processes=2)
    monkeypatch.setenv("FASTVIT_RUNS", str(tmp_path / "here"))
    start_and_kill(train_command(url, *settings, processes=2), 13, run_folder(url).metrics)
    kept = fetched(url, tmp_path / "kept")
    newest = s3_bucket.cat_file(f"{url.removeprefix('s3://')}/checkpoints/latest").decode()
    step = int(newest.removeprefix("step-"))
    assert 0 < step < STEPS and [row[0] for row in record(kept.metrics)[0]][:step] == list(range(1, step + 1))

    log = tmp_path / "log"  # rank 1 finds no records
    arguments = train_arguments(url, *settings, resume="auto")
    assert run_ranks(arguments, 2, log, lambda rank: {"FASTVIT_RUNS": str(tmp_path / f"node-{rank}")}), log.read_text()
    assert f"continuing {url} from step {step} of {STEPS}" in log.read_text()
    assert record(fetched(url, tmp_path / "there").metrics) == record(undisturbed / "metrics.jsonl")  # to the bit
