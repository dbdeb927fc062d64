"""Runs with images at their own proportions: however they are split, stopped and resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastvit_engine.cli import main

SETTINGS = [
    "model.image_size=16",
    "packing.max_patches=16",
    "packing.min_patches=3",
    "augment.crop_ratio=[0.4, 2.5]",
    "augment.randaugment_ops=1",
    "augment.mixup=0",
    "model.drop_path=0",
    "model.dropout=0",
    "train.duration=6 steps",
    "train.precision=fp32",
    "checkpoint.every=3 steps",
    "data.num_workers=1",
]


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, all images of a step at once."""
    return train(tmp_path_factory.mktemp("whole") / "run", *SETTINGS)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, ["zero.stage=3", "packing.token_budget=140"]),
        (3, ["zero.stage=1", "train.micro_batch_size=4"]),
        (2, ["zero.stage=2"]),
    ],
)
def test_processes_and_micro_batches_change_nothing(
    processes: int, settings: list[str], whole: Path, train: Any, tmp_path: Path
) -> None:
    run = train(tmp_path / "run", *SETTINGS, *settings, processes=processes)
    for row, expected in zip(rows_of(run), rows_of(whole), strict=True):
        for key in ("samples_hash", "tokens", "step"):
            assert row[key] == expected[key]
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    weights, others = (load_file(folder / "model.safetensors") for folder in (run, whole))
    for name, values in weights.items():
        torch.testing.assert_close(values, others[name], rtol=0, atol=2e-4, msg=name)


@pytest.mark.distributed
def test_a_resumed_run_is_the_same_to_the_bit(whole: Path, train: Any, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000006")  # as if it had been killed before that
    (run / "checkpoints" / "latest").write_text("step-00000003")
    (run / "model.safetensors").unlink()
    train(run, *SETTINGS, resume="auto")
    weights, others = (load_file(folder / "model.safetensors") for folder in (run, whole))
    assert all(torch.equal(values, others[name]) for name, values in weights.items())
    keys = ("step", "loss", "grad_norm", "samples_hash", "tokens")
    again, before = ([[row[key] for key in keys] for row in rows_of(folder)] for folder in (run, whole))
    assert again == before


@pytest.mark.distributed
def test_tokens_and_mfu_are_those_of_the_images(whole: Path) -> None:
    rows = rows_of(whole)
    assert len({row["tokens"] for row in rows}) > 1
    prefix = 0 if "pool: gap" in (whole / "config.yaml").read_text() else 1
    assert all(32 * (1 + prefix) <= row["tokens"] <= 32 * (16 + prefix) for row in rows)
    assert all(0 < row["mfu"] < 1 for row in rows)


@pytest.mark.distributed
def test_a_packed_model_is_evaluated_either_way(
    whole: Path, digits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of this set are squares, which both ways show to the model alike."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = []
    for settings in ([], ["--set", "packing.max_patches=16"]):
        assert main(["evaluate", str(whole), "--data", str(digits), "--json", *settings]) == 0
        found.append(json.loads(capsys.readouterr().out))
    squares, packed = found
    assert packed["samples"] == squares["samples"] > 300
    assert packed["loss"] == pytest.approx(squares["loss"], rel=1e-5) and packed["top1"] == squares["top1"]
    assert main(["evaluate", str(whole), "--data", str(digits), "--set", "packing.max_patches=17"]) == 2
    assert "packing.max_patches is 17, more than the 16 patches" in capsys.readouterr().err
