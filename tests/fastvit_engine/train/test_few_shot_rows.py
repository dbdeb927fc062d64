"""Few-shot accuracy of a run is that of `fastvit fewshot` for its checkpoint, at any world size and ZeRO stage."""

import json

import pytest

from fastvit_engine.checkpoint.export import find_checkpoint
from fastvit_engine.cli import main
from fastvit_engine.observe.metrics import read_all_metrics
from tests.fastvit_engine.train.test_equivalence import SHARD_EVERYTHING
from tests.in_full import in_full

pytestmark = pytest.mark.distributed


@pytest.fixture
def settings(digits):
    return [
        "train.precision=fp32",
        "train.duration=6 steps",
        "schedule.warmup=1 step",
        "schedule.kind=constant",
        "ema.decay=0.9",
        f"evaluate.fewshot.train={digits}",
        f"evaluate.fewshot.eval={digits}",
        "evaluate.fewshot.shots=[10, 1]",
        "evaluate.fewshot.every=2 steps",
    ]


def rows_of(run):
    return [(row["step"], row["eval"], row["shots"]) for row in read_all_metrics(run / "metrics.jsonl").few_shot]


@pytest.mark.parametrize(("processes", "stage"), [in_full(1, 0), in_full(1, 3), in_full(2, 0), (2, 3)])
def test_rows_equal_the_command_on_the_checkpoint(train, settings, digits, tmp_path, capsys, processes, stage):
    own = [f"zero.stage={stage}", *([SHARD_EVERYTHING] if stage == 3 else [])]
    run = train(tmp_path / "run", *settings, *own, processes=processes)
    rows = rows_of(run)
    assert [row[:2] for row in rows] == [(step, name) for step in (2, 4, 6) for name in ("fewshot", "fewshot_ema")]
    for row, options in zip(rows[-2:], ([], ["--ema"]), strict=True):
        words = ["fewshot", run, "--train", digits, "--eval", digits, "--shots", 1, 10, "--json", *options]
        capsys.readouterr()
        assert main([str(word) for word in [*words, "--set", "data.num_workers=0"]]) == 0
        assert json.loads(capsys.readouterr().out) == {"shots": row[2], "l2": 1024.0}
    assert rows[-2][2] != rows[0][2]


def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(train, settings, tmp_path):
    whole = train(tmp_path / "whole", *settings)
    for steps in (3, 6):
        train(tmp_path / "run", *settings, f"train.duration={steps} steps", resume="auto")
    resumed = rows_of(tmp_path / "run")
    assert [row[0] for row in resumed] == [2, 2, 3, 3, 4, 4, 6, 6]
    assert [row for row in resumed if row[0] != 3] == rows_of(whole)


def test_a_checkpoint_keeps_the_last_evaluation_of_data_eval(train, settings, digits, tmp_path):
    intervals = ["evaluate.every=2 steps", "evaluate.fewshot.every=3 steps", "checkpoint.every=3 steps"]
    run = train(tmp_path / "run", *settings, f"data.eval={digits}", *intervals)
    state = find_checkpoint(str(run / "checkpoints" / "step-00000003")).read_manifest().state
    assert (state.evaluated_at, list(state.accuracy)) == (2, ["eval", "eval_ema"])
    assert [row[0] for row in rows_of(run)] == [3, 3, 6, 6]
