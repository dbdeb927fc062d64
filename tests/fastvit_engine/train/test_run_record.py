import json

import yaml

from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.run_folder import RunFolder


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
    assert events[0]["world_size"] == 1 and events[0]["zero_stage"] == 0 and len(events[0]["hosts"]) == 1
    assert events[-1]["reason"] == "finished"
