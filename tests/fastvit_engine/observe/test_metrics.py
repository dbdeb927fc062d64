import json
import math
import re
from pathlib import Path

import pytest

from fastvit_engine.errors import UserError
from fastvit_engine.observe.metrics import MetricsWriter, read_all_metrics, read_metrics
from fastvit_engine.observe.run_folder import RunFolder
from tests.fastvit_engine.observe.conftest import eval_row, few_shot_row, loss_row, own_row, train_row


def write(run: RunFolder, steps: range, resume_step: int = 0) -> None:
    writer = MetricsWriter(run, resume_step)
    for step in steps:
        writer.write(train_row(step))


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    rows = [train_row(1), train_row(2, grad_norm=None, mfu=None)]
    evaluation = eval_row(2, 0.9, eval="eval_ema", top5=None)
    writer = MetricsWriter(run, 0)
    for row in rows:
        writer.write(row)
    writer.write(evaluation)
    assert read_metrics(run.metrics) == (rows, [evaluation])


def test_rows_of_few_shot_accuracy_are_rows_of_their_own(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    rows = [few_shot_row(2, 0.25, 0.5), few_shot_row(2, 0.5, math.nan, eval="fewshot_ema")]
    writer = MetricsWriter(run, 0)
    writer.write(train_row(1))
    for row in rows:
        writer.write(row)
    found = read_all_metrics(run.metrics)
    assert (len(found.train), found.evaluations, found.few_shot[0]) == (1, [], rows[0])
    assert math.isnan(found.few_shot[1]["shots"]["5"]["mean"])
    assert read_metrics(run.metrics) == (found.train, [])
    MetricsWriter(run, 1)
    assert read_all_metrics(run.metrics).few_shot == []


def test_held_out_losses_without_accuracy_are_rows_of_their_own(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    rows = [loss_row(2, 0.5), loss_row(2, math.inf, eval="eval_ema"), loss_row(4, 0.25)]
    writer = MetricsWriter(run, 0)
    for row in (train_row(1), eval_row(1, 0.5), *rows):
        writer.write(row)
    found = read_all_metrics(run.metrics)
    assert found == ([train_row(1)], [eval_row(1, 0.5)], [], [], rows)
    for key in ("loss", "samples", "step"):
        with pytest.raises(ValueError, match=f"lacks '{key}'"):
            writer.write({name: value for name, value in rows[0].items() if name != key})
    with pytest.raises(ValueError, match="lacks 'top1'"):
        writer.write({name: value for name, value in eval_row(1, 0.5).items() if name != "top1"})


def test_rows_of_evaluators_of_ones_own_are_rows_of_their_own(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    writer = MetricsWriter(run, 0)
    row = own_row(2, a=math.inf, b=1)
    writer.write(row)
    assert read_all_metrics(run.metrics).own == [row]
    for figures in ([], {"a": "x"}, {"a": None}, {"a": True}):
        with pytest.raises(ValueError, match="has figures .*, not numbers by name"):
            writer.write(row | {"figures": figures})


@pytest.mark.parametrize("shots", [{"a": {}}, {"5": {"mean": 0.5}}, {"5": {"mean": 1, "std": 0, "seeds": ["x"]}}, [1]])
def test_other_figures_of_few_shot_accuracy_are_damage(tmp_path: Path, shots: object) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="has shots"):
        MetricsWriter(run, 0).write(few_shot_row(1, shots=shots))
    run.metrics.write_text(json.dumps(few_shot_row(1, shots=shots)) + "\n")
    assert read_all_metrics(run.metrics).few_shot == []


def test_values_that_json_lacks(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    writer = MetricsWriter(run, 0)
    writer.write(train_row(1, loss=math.nan, grad_norm=math.inf, lr=-math.inf))

    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(run.metrics.read_text(), parse_constant=reject)["loss"] == "nan"
    (row,), _ = read_metrics(run.metrics)
    assert math.isnan(row["loss"]) and row["grad_norm"] == math.inf and row["lr"] == -math.inf
    MetricsWriter(run, 1)  # a rewrite keeps them
    assert read_metrics(run.metrics)[0][0]["grad_norm"] == math.inf


def test_resume_drops_the_steps_after_the_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    writer = MetricsWriter(run, 0)
    for step in range(1, 8):
        writer.write(train_row(step))
    writer.write(eval_row(5, 0.8))
    writer.write(eval_row(6, 0.9))
    write(run, range(6, 10), resume_step=5)
    train, evaluations = read_metrics(run.metrics)
    assert [row["step"] for row in train] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [row["step"] for row in evaluations] == [5]


def test_resume_drops_a_half_written_line_and_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path)
    write(run, range(1, 4))
    with open(run.metrics, "ab") as file:
        file.write(json.dumps(train_row(4)).encode()[:40])
    write(run, range(4, 6), resume_step=3)
    assert [row["step"] for row in read_metrics(run.metrics)[0]] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err.count("metrics.jsonl ended in half a line, 40 bytes,") == 1


def test_resume_from_step_zero_and_without_a_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    write(run, range(1, 3), resume_step=0)
    write(run, range(1, 2), resume_step=0)
    assert [row["step"] for row in read_metrics(run.metrics)[0]] == [1]


def test_an_incomplete_row_is_a_bug_of_the_caller(tmp_path: Path) -> None:
    row = train_row(1)
    del row["lr"]
    writer = MetricsWriter(RunFolder(tmp_path), 0)
    with pytest.raises(ValueError, match="lacks 'lr'"):
        writer.write(row)


def test_reading_leaves_out_a_half_written_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = json.dumps(train_row(1)).encode()
    for cut in range(1, len(line)):
        path.write_bytes(line + b"\n" + line[:cut])
        assert len(read_metrics(path)[0]) == 1


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{oops", "line 2 is not JSON"),
        ("", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"step": 3}', "line 2 lacks 'epoch'"),
        ('{"eval": "eval", "step": 3}', "line 2 lacks 'loss'"),
        (json.dumps(train_row(1) | {"step": "3"}), "line 2 has step '3', not an integer"),
        (json.dumps(train_row(1) | {"step": 1.0}), "line 2 has step 1.0, not an integer"),
        ("\0" * 300, "line 2 is not JSON"),
        (json.dumps(train_row(1) | {"loss": 10**400}), "line 2 has a loss of too many digits"),
        (json.dumps(train_row(1) | {"seconds": 1}).replace("1}", "1e999}"), "line 2 has seconds inf, not a duration"),
        (json.dumps(train_row(1) | {"step": True}), "line 2 has step True, not an integer"),
        (json.dumps(train_row(1) | {"loss": "much"}), "line 2 has loss 'much', not a number"),
        (json.dumps(train_row(1) | {"loss": None}), "line 2 has loss None, not a number"),
        (json.dumps(train_row(1) | {"mfu": []}), r"line 2 has mfu \[\], not a number"),
        (json.dumps(eval_row(1, 0.5) | {"eval": 7}), "line 2 has eval 7, not a text"),
        (json.dumps(train_row(1) | {"bad_samples": {}}), "line 2 has bad_samples {}, not an integer"),
    ],
)
def test_damaged_lines_are_left_out_and_counted_and_a_resume_drops_them(
    tmp_path: Path, line: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path)
    good = [json.dumps(train_row(step)) for step in (1, 2, 3)]
    run.metrics.write_text(f"{good[0]}\n{line}\n{good[1]}\n{good[2]}\n")
    assert [row["step"] for row in read_metrics(run.metrics)[0]] == [1, 2, 3]
    assert re.search(rf"metrics\.jsonl {problem}: left out\n$", capsys.readouterr().err)
    write(run, [3], resume_step=2)
    assert re.search(rf"metrics\.jsonl {problem}: left out\n$", capsys.readouterr().err)
    assert [row["step"] for row in read_metrics(run.metrics)[0]] == [1, 2, 3]
    assert capsys.readouterr().err == ""


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the metrics.*metrics\.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("content", [b"", bytes(700), bytes(1 << 20)])
def test_a_file_of_zeros_holds_no_row_and_a_resume_continues_it(tmp_path: Path, content: bytes) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_bytes(content)
    assert read_metrics(run.metrics) == ([], [])
    write(run, range(6, 9), resume_step=5)
    assert [row["step"] for row in read_metrics(run.metrics)[0]] == [6, 7, 8]
    assert b"\0" not in run.metrics.read_bytes()
