import json

import yaml

from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.observe.run_folder import RunFolder
from tests.fastvit_engine.warm_ranks import run_ranks


def test_a_run_leaves_its_choices_and_events(train, tmp_path):
    """zero.stage=auto takes stage 0 for a tiny model, says so, and the recorded recipe leaves the choice open."""
    folder = train(tmp_path / "run", "zero.stage=auto", "train.duration=4 steps", "checkpoint.every=2 steps")
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["zero_stage"] == 0
    choices = {choice["key"]: choice for choice in environment["defaults"]["choices"]}
    assert choices["zero.stage"]["value"] == 0 and "fits whole" in choices["zero.stage"]["reason"]
    assert choices["train.micro_batch_size"]["value"] == 32
    assert yaml.safe_load((folder / "config.yaml").read_text())["zero"]["stage"] == "auto"

    events = read_events(RunFolder(folder))
    assert [(event["event"], event["step"]) for event in events] == [
        ("start", 0),
        ("checkpoint", 0),
        ("checkpoint", 2),
        ("checkpoint", 4),
        ("stop", 4),
    ]
    assert events[0]["config"] == "configs/config-0001.yaml"
    assert (folder / events[0]["config"]).read_text() == (folder / "config.yaml").read_text()
    assert events[0]["world_size"] == 1 and events[0]["zero_stage"] == 0 and len(events[0]["hosts"]) == 1
    assert events[-1]["reason"] == "finished"


def test_rows_say_where_the_time_of_a_step_went(train, tmp_path):
    rows, _ = read_metrics(train(tmp_path / "run", "train.duration=4 steps", "train.log_every=2") / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4]
    for row in rows:
        parts = [row["data_wait"], row["forward"], row["backward"], row["update"]]
        assert min(parts) > 0 and sum(parts) <= 1  # they do not overlap


def test_a_run_that_resumes_with_other_values_says_and_records_which(train, train_arguments, tmp_path):
    """Its newest checkpoint is damaged, and so it resumes at the one before: step 1."""
    every = "checkpoint.every=1 steps"
    folder = train(tmp_path / "run", every, "train.duration=2 steps", "model.drop_path=0.0")
    damaged = folder / "checkpoints" / "step-00000002" / "rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    changed = [every, "train.duration=4 steps", "model.drop_path=0.1", "loss.label_smoothing=0.1"]
    log = tmp_path / "log"
    assert run_ranks(train_arguments(folder, *changed, resume="auto"), 1, log), log.read_text()
    sentence = (
        "changed from step 1 on: model.drop_path 0.0 -> 0.1; train.duration 2 steps -> 4 steps; "
        "loss.label_smoothing 0.0 -> 0.1"
    )
    assert sentence in log.read_text()
    events = [event for event in read_events(RunFolder(folder)) if event["event"] in ("start", "configuration")]
    assert [(event["event"], event["step"]) for event in events] == [("start", 0), ("configuration", 1), ("start", 1)]
    assert events[1]["message"] == sentence
    kept = [yaml.safe_load((folder / event["config"]).read_text()) for event in events[::2]]
    assert [config["train"]["duration"] for config in kept] == ["2 steps", "4 steps"]
