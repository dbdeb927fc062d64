"""A profile of some steps: what is written, and that training is the same, bit for bit."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvit_engine.config.sections import ProfileConfig
from fastvit_engine.errors import UserError
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.train.start import check_profile
from tests.fastvit_engine.warm_ranks import exit_codes_of
from tests.in_full import only_in_full

pytestmark = pytest.mark.distributed
STEPS = ["train.duration=6 steps", "schedule.warmup=1 step", "train.profile.steps=3-4"]
Train = Callable[..., Path]


def trained(run: Path) -> list[tuple[object, ...]]:
    """What of the metrics and the weights must not depend on whether steps are profiled."""
    rows, _ = read_metrics(run / "metrics.jsonl")
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows] + [(run / "model.safetensors").read_bytes()]


def table(run: Path, name: str) -> Any:
    return json.loads((run / "profile" / f"{name}.json").read_text())


def test_a_profile_has_a_trace_per_step_and_a_table_and_changes_no_bit(train: Train, tmp_path: Path) -> None:
    run = train(tmp_path / "run", *STEPS)
    assert {path.name for path in (run / "profile").iterdir()} == {
        "rank-0-step-3.trace.json.gz",
        "rank-0-step-4.trace.json.gz",
        "rank-0-steps-3-4.json",
        "rank-0-steps-3-4.txt",
    }
    with gzip.open(run / "profile" / "rank-0-step-3.trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    phases = ["phase: waiting for data", "phase: forward", "phase: backward", "phase: optimizer step"]
    assert [name for name in names if name in phases] == phases  # one step, with each phase once
    found = table(run, "rank-0-steps-3-4")
    assert (found["steps"], found["rank"], found["device"]) == ([3, 4], 0, "cpu")
    assert {line["name"]: line["calls"] for line in found["phases"]} == {
        name.removeprefix("phase: "): 2 for name in phases
    }
    assert 0 < sum(line["seconds"] for line in found["phases"]) <= found["seconds"]
    kinds = {line["name"]: line for line in found["kinds"]}
    assert {"matrix products", "attention", "optimizer", "data"} <= set(kinds)
    products = sum(line["calls"] for line in found["kernels"] if line["name"] in ("aten::mm", "aten::addmm"))
    assert products == kinds["matrix products"]["calls"] and products % 2 == 0
    assert sum(line["share"] for line in found["kernels"]) == pytest.approx(1)
    assert "matrix products" in (run / "profile" / "rank-0-steps-3-4.txt").read_text()
    assert trained(run) == trained(train(tmp_path / "alone", *STEPS[:2]))


@only_in_full
def test_a_run_that_resumes_profiles_the_steps_that_are_left_on_each_rank(train: Train, tmp_path: Path) -> None:
    settings = ["schedule.kind=constant", "schedule.warmup=1 step", "train.profile.ranks=[0, 1]"]
    run = train(tmp_path / "run", *settings, "train.duration=4 steps", "train.profile.steps=4", processes=2)
    longer = [*settings, "train.duration=9 steps", "train.profile.steps=3-6"]
    train(run, *longer, processes=2, resume="auto")
    for rank in (0, 1):
        assert table(run, f"rank-{rank}-steps-4-4")["steps"] == [4]
        assert table(run, f"rank-{rank}-steps-5-6")["rank"] == rank
    written = sorted((run / "profile").iterdir())
    train(run, *longer, "train.duration=10 steps", processes=2, resume="auto")  # from step 9, after the last one
    assert sorted((run / "profile").iterdir()) == written and len(written) == 2 * (3 + 2 * 2)


@only_in_full
def test_steps_that_the_run_does_not_have_are_refused_before_anything_is_written(
    train_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    assert exit_codes_of(train_arguments(tmp_path / "run", "train.profile.steps=20-21"), 1, log) == [2]
    assert log.read_text().count("fastvit: error: train.profile.steps is 20-21") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("steps", "ranks", "words"),
    [
        ("5-21", [0], "steps is 5-21, and the run has 20 steps"),
        ("5", [0, 2], "ranks has 2, and the run has ranks 0 to 1"),
    ],
)
def test_steps_and_ranks_that_the_run_does_not_have_are_refused(steps: str, ranks: list[int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_profile(ProfileConfig.model_validate({"steps": steps, "ranks": ranks}), 20, 2)
    check_profile(ProfileConfig.model_validate({"steps": "15-20", "ranks": [1]}), 20, 2)
    check_profile(ProfileConfig.model_validate({"ranks": [7]}), 20, 2)
