"""A run whose folder is in an object store: killed on one machine, and continued on others bit for bit."""

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
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.observe.run_folder import RunFolder, run_folder
from tests.fastvit_engine.warm_ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SETTINGS = ["train.duration=30 steps", "train.precision=fp32", "checkpoint.every=5 steps", "evaluate.every=15 steps"]


def record(metrics):
    """Every figure of a run that the machine's speed does not enter."""
    training, evaluations = read_metrics(metrics)
    steps = [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["samples_hash"]) for row in training]
    return steps, [(row["step"], row["eval"], row["top1"], row["loss"]) for row in evaluations]


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


def test_killed_between_checkpoints_and_continued_on_other_machines(
    train, train_arguments, train_command, digits, s3_bucket, tmp_path, monkeypatch, capsys
):
    settings = [*SETTINGS, f"data.eval={digits}/eval-*.tar"]
    undisturbed = train(tmp_path / "undisturbed", *settings, processes=2)
    url = f"s3://bucket/{tmp_path.name}/run"

    monkeypatch.setenv("FASTVIT_RUNS", str(tmp_path / "here"))
    here = run_folder(url)
    start_and_kill(train_command(url, *settings, processes=2), 13, here.metrics)
    kept = RunFolder(tmp_path / "kept", url)
    Records(kept).fetch()
    newest = s3_bucket.cat_file(f"bucket/{tmp_path.name}/run/checkpoints/latest").decode()
    step = int(newest.removeprefix("step-"))
    assert 0 < step < 30 and [row[0] for row in record(kept.metrics)[0]][:step] == list(range(1, step + 1))

    # Two machines that have never seen the run; rank 1 finds no records.
    log = tmp_path / "log"
    arguments = train_arguments(url, *settings, resume="auto")
    assert run_ranks(arguments, 2, log, lambda rank: {"FASTVIT_RUNS": str(tmp_path / f"node-{rank}")}), log.read_text()
    text = log.read_text()
    (node,) = (tmp_path / "node-0").iterdir()
    assert f"continuing {url} from step {step} of 30" in text and f"working folder: {node}" in text
    assert f"finished {url}" in text and f"next: fastvit report {url}" in text

    there = RunFolder(tmp_path / "there", url)
    Records(there).fetch()
    assert record(there.metrics) == record(undisturbed / "metrics.jsonl")  # to the bit
    for name in ("config.yaml", "metrics.jsonl", "events.jsonl", "recovery.json", "configs/config-0001.yaml"):
        assert (node / name).read_bytes() == (there.path / name).read_bytes(), name
    events = [event["event"] for event in read_events(there)]
    assert events.count("start") == 2 and events[-1] == "stop"
    ours, theirs = load_model(url).state_dict(), load_model(undisturbed).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    assert main(["export", url, "--out", str(tmp_path / "weights.safetensors")]) == 0
    weights = s3_bucket.cat_file(f"bucket/{tmp_path.name}/run/model.safetensors")
    assert weights == (tmp_path / "weights.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["report", url]) == 0
    assert f"report: {url}/report.html" in capsys.readouterr().out
    assert s3_bucket.cat_file(f"bucket/{tmp_path.name}/run/report.html").startswith(b"<!DOCTYPE html>")

    # The same command again, anywhere: nothing to do, and nothing is uploaded again.
    before = s3_bucket.client.head_object(Bucket="bucket", Key=f"{tmp_path.name}/run/model.safetensors")
    monkeypatch.setenv("FASTVIT_RUNS", str(tmp_path / "later"))
    assert main([*arguments, "--cpu-processes", "2"]) == 0
    assert f"{url} is complete, with 30 steps" in capsys.readouterr().out
    after = s3_bucket.client.head_object(Bucket="bucket", Key=f"{tmp_path.name}/run/model.safetensors")
    assert before["LastModified"] == after["LastModified"]
    assert not list(Path(run_folder(url).path).glob("*.safetensors"))

    # Without --resume, a folder that holds a run is refused, wherever it is.
    assert main([*train_arguments(url, *settings), "--cpu-processes", "2"]) == 2
    assert f"{url} already holds a run: add --resume auto" in capsys.readouterr().err
    s3_bucket.rm(f"bucket/{tmp_path.name}/")
