"""The scripts that call the engine train, measure and check what they say, on few steps."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fastvit_engine
from tests.docs.conftest import official, photos
from tests.in_full import only_in_full

__all__ = ["official", "photos"]  # fixtures
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the longest take two minutes of a machine at rest
EXAMPLES = Path(__file__).parents[2] / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Run:
    """run(script, *arguments, **environment) -> what it prints, in an empty folder of a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MODEL", "OUT"):
        monkeypatch.delenv(name, raising=False)

    def script(name: str, *arguments: object, **environment: object) -> str:
        for key, value in {"CUDA_VISIBLE_DEVICES": "", **environment}.items():
            monkeypatch.setenv(key, str(value))
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def top1(printed: str) -> float:
    return float(re.findall(r"top-1 (\S+)%", printed)[-1])


def test_every_example_but_the_tour_is_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    del lengths["explore_model.py"]  # a notebook about one model, from loading to fine-tuning
    assert len(lengths) >= 10 and max(lengths.values()) < 60, lengths


def test_one_operation(run: Run) -> None:
    printed = run("one_op.py")
    assert printed.count("relative error") == 6 and "layer_norm" in printed  # the script asserts that each is small


def test_few_shot_accuracy(run: Run, official) -> None:
    shots = [float(share) for share in re.findall(r"-shot accuracy .*: (\S+)% ±", run("few_shot.py"))]
    assert len(shots) == 3 and shots[0] < shots[-1] and shots[-1] > 20  # 10 is a guess


def test_pretrain_then_check_the_ledger(run: Run, tmp_path: Path) -> None:
    """One run for both: the ledger agrees with the shards until a line of it is changed."""
    assert top1(run("pretrain_folder.py", STEPS=6)) > 0
    trained = tmp_path / "runs" / "pretrain_folder" / "run"
    assert "2 logged steps of" in (printed := run("read_ledger.py", trained)) and ": 2 as computed" in printed
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    (last,) = (row for row in rows if row["step"] == 6 and "samples_hash" in row)
    last["samples_hash"] = f"{int(last['samples_hash'], 16) ^ 1:016x}"
    (trained / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match=r"steps \[6\] trained on others"):
        run("read_ledger.py", trained)


@only_in_full
def test_pretrain_on_photos(run: Run, photos: Path) -> None:
    assert top1(run("pretrain_folder.py", photos, STEPS=2, RECIPE="quickstart")) >= 0
    assert fastvit_engine.load_model("runs/pretrain_folder/run").class_names == ("bird", "dog", "insect", "reptile")


@only_in_full
def test_fine_tune_what_was_pretrained(run: Run) -> None:
    before = top1(run("pretrain_folder.py", STEPS=300))
    assert before > 60
    assert top1(run("finetune.py", STEPS=40)) > 60


@only_in_full
def test_fine_tune_other_weights_on_photos(run: Run, official, photos: Path) -> None:
    run("finetune.py", photos, MODEL=official("ViT-S_16.npz"), STEPS=1)
    assert fastvit_engine.load_model("runs/finetune/run").config.image_size == 224


@only_in_full
def test_an_objective_of_ones_own(run: Run) -> None:
    assert top1(run("own_objective.py", STEPS=300)) > 60
    recorded = fastvit_engine.load_config("runs/own_objective/run/config.yaml").config
    assert recorded.train.objective == "own_objective:Focal"


@only_in_full
def test_a_pipeline_of_ones_own(run: Run) -> None:
    assert top1(run("own_webdataset.py", STEPS=300)) > 60
