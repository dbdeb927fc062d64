"""Studies of a few runs, and a `fastvit train` that takes no time."""

import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from fastvit_engine.study.definition import read_study
from fastvit_engine.study.planning import plan_study

SETTINGS = {
    "model.width": 32,
    "model.depth": 2,
    "model.image_size": 8,
    "train.duration": "20 steps",
    "train.log_every": 5,
    "evaluate.every": None,
    "checkpoint.every": None,
    "observe.trackers": [],
}
RUNS = [{"model.pool": ["cls", "gap"], "optimizer.learning_rate": [1e-3, 1e-2]}]
FAKE = """
    import json, os, signal, sys, time
    from pathlib import Path

    words = sys.argv[1:]
    assert words[0] == "train" and words[-2:] == ["--resume", "auto"]
    settings = dict(word.split("=", 1) for before, word in zip(words, words[1:]) if before == "--set")
    out = Path(words[words.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "starts", "a") as file:
        file.write("x")
    behaviour = os.environ.get("FAKE_" + settings["optimizer.learning_rate"].replace(".", "_"), "")
    print("training", settings)
    if behaviour == "bad input":
        sys.stderr.write("fastvit: error: the loss is nan: lower the rate\\n")
        sys.exit(2)
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "waits":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(76))
        (out / "waiting").touch()
        time.sleep(60)
    step, top1 = 20, float(settings["optimizer.learning_rate"]) * 10 + int(settings["seed"]) / 10
    train = {"step": step, "epoch": 0.5, "samples": 640, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0,
             "images_per_second": 10.0, "mfu": None, "data_wait": 0.0, "memory_bytes": 1,
             "samples_hash": "0", "seconds": 2.0}
    one = {"step": step, "eval": "eval", "top1": top1, "top5": 1.0, "loss": 2.0, "samples": 300, "seconds": 1.0}
    shots = {"5": {"mean": top1 / 2, "std": 0.0, "seeds": [top1 / 2]}}
    few = {"step": step, "eval": "fewshot", "shots": shots, "l2": 1024.0, "samples": 300, "seconds": 1.0}
    rows = [train, one] if behaviour == "no few-shot" else [train, one, few]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""


@pytest.fixture(scope="session")
def fake(tmp_path_factory) -> tuple[str, str]:
    """The command of a `fastvit train` that only writes the last rows of metrics."""
    path = tmp_path_factory.mktemp("fake") / "fastvit.py"
    path.write_text(textwrap.dedent(FAKE))
    return sys.executable, str(path)


@pytest.fixture
def write_study(tmp_path):
    """write_study(**keys) -> the file of a study of quickstart, of four runs"""

    def write(**keys) -> Path:
        values = {"name": "tiny", "recipe": "quickstart", "settings": SETTINGS, "runs": RUNS, **keys}
        path = tmp_path / "tiny.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in values.items() if value != "left out"}, sort_keys=False)
        )
        return path

    return write


@pytest.fixture
def data(digits) -> list[str]:
    return [f"data.train={digits}/train-*.tar", f"data.eval={digits}/eval-*.tar"]


@pytest.fixture
def plan(write_study, data):
    """plan(*settings, seeds=None, **keys) -> the study and its runs"""

    def make(*settings, seeds=None, **keys):
        path = write_study(**keys)
        study = read_study(path)
        return study, plan_study(study, path, [*data, *settings], seeds=seeds)

    return make
