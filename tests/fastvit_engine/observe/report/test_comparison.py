import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fastvit_engine.errors import UserError
from fastvit_engine.observe.report.comparison import MOST_RUNS, name_runs, render_comparison
from fastvit_engine.observe.report.recorded_run import RecordedRun, load_run
from fastvit_engine.observe.report.settings import flat_settings, machine_differences, setting_differences
from tests.fastvit_engine.observe.conftest import ENVIRONMENT, eval_row, few_shot_row, loss_row, train_row
from tests.fastvit_engine.observe.report.page_parser import Page
from tests.in_full import in_full

SETTINGS = {"train.objective": "classify", "data.eval": "e-*.tar", "optimizer.learning_rate": "0.1"}


def a_run(folder: Path, rows: list[Any], **environment: Any) -> RecordedRun:
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT | environment))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_run(folder)


def compared(
    runs: Mapping[str, RecordedRun], settings: list[Mapping[str, str] | None] | None = None, **options: Any
) -> tuple[Page, str]:
    """The page, and its text in one line."""
    html = render_comparison(list(runs.values()), list(runs), settings or [SETTINGS] * len(runs), **options)
    page = Page(html)
    page.check()
    return page, " ".join(page.text.split())


def test_each_chart_has_a_line_per_run_of_its_own_colour_and_dash(tmp_path: Path) -> None:
    runs = {
        name: a_run(tmp_path / name, [train_row(420), eval_row(420, 0.5), train_row(steps), eval_row(steps, 0.9)])
        for name, steps in (("a", 840), ("b", 630))
    }
    page, _ = compared(runs)
    assert page.headings == [
        "Comparison of 2 runs",
        *("Figures", "Results", "Speed and cost"),
        *("Differences", "Settings", "Model, machine and software"),
        *("Learning", "Training loss", "Held-out loss", "Top-1"),
        *("Throughput", "Images per second", "MFU", "Waiting for data", "Memory"),
        *("Optimisation", "Learning rate", "Gradient norm"),
    ]
    charts = len(page.all("figure", "chart"))
    lines = [path for path in page.all("path", "line") if "L" in (path["d"] or "")]
    assert charts == 9 and len(lines) == 2 * charts
    assert {line["class"] for line in lines} == {"line run-0", "line run-1 dash-1"}
    ends = {(line["class"] or "")[5:10]: re.findall(r"L([\d.]+) ", line["d"] or "")[-1] for line in lines}
    assert ends == {"run-0": "1000.0", "run-1": "750.0"}  # one axis for all


def test_the_best_figure_is_marked_and_what_is_missing_is_a_dash(tmp_path: Path) -> None:
    runs = {
        "good": a_run(tmp_path / "1", [train_row(840, images_per_second=10.0), eval_row(840, 0.9, loss=0.2)]),
        "fast": a_run(tmp_path / "2", [train_row(840, images_per_second=99.0), eval_row(840, 0.8, loss=0.1)]),
        "new": a_run(tmp_path / "3", [train_row(1, mfu=None, images_per_second=5.0)]),
    }
    page, text = compared(runs)
    assert "good 90.0 % (best) 99.0 % 90.0 % (best) 0.2" in text
    assert "fast 80.0 % 99.0 % 80.0 % 0.1 (best)" in text  # top-5 is the same, so none is best
    assert "new – – – – 2 " in text
    assert "good 10 15.5 %" in text and "fast 99 (best) 15.5 %" in text and "new 5 – 1.0 %" in text
    assert "not running" in text


def test_only_finished_runs_can_have_the_best_result(tmp_path: Path) -> None:
    runs = {
        "short": a_run(tmp_path / "1", [train_row(420, loss=0.1, images_per_second=999.0), eval_row(420, 0.9)]),
        "long": a_run(tmp_path / "2", [train_row(840, loss=0.5), eval_row(840, 0.7)]),
        "other": a_run(tmp_path / "3", [train_row(840, loss=0.9), eval_row(840, 0.8)]),
    }
    _, text = compared(runs)
    assert "Not finished, so not marked as best: short." in text
    assert "short 90.0 % 99.0 % 90.0 % 0.1 0.1 long" in text
    assert "0.5 (best) other 80.0 % (best)" in text
    assert "short 999 (best)" in text  # of speeds, it may be


def test_a_loss_that_is_not_finite_is_shown_and_is_not_the_best(tmp_path: Path) -> None:
    runs = {
        str(number): a_run(tmp_path / str(number), [train_row(840) | {"loss": loss}])
        for number, loss in enumerate(("nan", 0.5, 0.7))
    }
    page, text = compared(runs)
    assert "0 nan 1 0.5 (best) 2 0.7" in text


def test_only_settings_that_differ_are_listed(tmp_path: Path) -> None:
    runs = {"a": a_run(tmp_path / "a", [train_row(1)]), "b": a_run(tmp_path / "b", [train_row(1)], world_size=8)}
    other = SETTINGS | {"optimizer.learning_rate": "0.2", "ema.decay": "<b>"}
    _, text = compared(runs, [SETTINGS, other])
    assert "Settings a b optimizer.learning_rate 0.1 0.2 ema.decay – <b> Model" in text
    assert "Model, machine and software a b processes 2 8 Data order" in text
    _, text = compared({"a": runs["a"]}, [SETTINGS])
    assert "All settings are the same." in text and "All are the same." in text
    _, text = compared(runs, [SETTINGS, None])
    assert "Unknown, as config.yaml is missing or damaged: b." in text


def test_settings_are_flat_and_differ_by_value() -> None:
    nested = {"name": "x", "a": {"b": 1, "c": {"d": [1, 2.5, None]}, "e": {}}, "f": "text", "g": None, "h": True}
    assert flat_settings(nested) == {
        "name": "x", "a.b": "1", "a.c.d": "[1, 2.5, null]", "a.e": "{}", "f": "text", "g": "null", "h": "true",
    }  # fmt: skip
    assert setting_differences([{"a": "1", "name": "x"}, {"a": "1", "name": "y"}]) == []
    assert setting_differences([{"a": "1"}, {"b": "2"}, None]) == [("a", ["1", None, None]), ("b", [None, "2", None])]
    versions = {"versions": ENVIRONMENT["versions"] | {"torch": "9"}}
    assert machine_differences([ENVIRONMENT, ENVIRONMENT | versions]) == [("torch", ["2.13.0", "9"])]


def test_figures_that_mean_different_things_are_not_ranked(tmp_path: Path) -> None:
    rows = [[train_row(840, loss=loss), eval_row(840, loss)] for loss in (0.5, 0.9)]
    runs = {str(number): a_run(tmp_path / str(number), own) for number, own in enumerate(rows)}
    page, text = compared(runs, [SETTINGS, SETTINGS | {"train.objective": "mae", "data.eval": "other"}])
    assert "Losses are not compared: train.objective differs." in text
    assert "The runs were evaluated on different images, so none is marked as best: data.eval differs." in text
    assert "Losses mean different things: train.objective differs." in text
    assert "(best)" not in text
    more = {"0": runs["0"], "1": a_run(tmp_path / "more", [eval_row(840, 0.9, samples=7)])}
    assert "so none is marked as best: the numbers of images differ." in compared(more)[1]


def test_losses_without_labels_are_ranked_among_runs_with_the_same_masks(tmp_path: Path) -> None:
    runs = {str(n): a_run(tmp_path / str(n), [train_row(840, loss=loss), loss_row(840, loss)], objective="mae")
            for n, loss in enumerate((0.5, 0.9))}  # fmt: skip
    masked = [SETTINGS | {"train.objective": "mae", "mae.mask_ratio": ratio} for ratio in ("0.75", "0.5")]
    _, text = compared(runs, [masked[0], masked[0]])
    assert "held-out loss training loss 0 0.5 (best) 0.5 (best) 1 0.9 0.9" in text
    _, text = compared(runs, masked)
    assert "Losses are not compared: mae.mask_ratio differs." in text and "(best)" not in text.partition("Learning")[0]
    older = [SETTINGS, SETTINGS | {"mae.mask_ratio": "0.75"}]  # labels: the key means nothing
    assert "Losses are not compared" not in compared(runs, older)[1]


def test_few_shot_figures_stand_side_by_side(tmp_path: Path) -> None:
    runs = {
        "a": a_run(tmp_path / "a", [few_shot_row(420, 0.9), few_shot_row(840, 0.1, 0.2)]),
        "b": a_run(tmp_path / "b", [few_shot_row(840, 0.3), few_shot_row(840, 0.25, eval="fewshot_ema")]),
        "c": a_run(tmp_path / "c", [train_row(1)]),
    }
    page, text = compared(runs)
    assert "run 1-shot 5-shot EMA 1-shot a 10.0 % 20.0 % – b 30.0 % (best) – 25.0 % c – – –" in text
    assert {"1-shot accuracy", "5-shot accuracy"} <= set(page.headings)
    other = SETTINGS | {"evaluate.fewshot.eval": "x"}
    assert "30.0 % –" in compared(runs, [SETTINGS, other, SETTINGS])[1]  # of other shards: not marked


def test_the_order_of_samples_is_compared(tmp_path: Path) -> None:
    def run(name: str, hashes: dict[int, str]) -> RecordedRun:
        return a_run(tmp_path / name, [train_row(step, samples_hash=text) for step, text in hashes.items()])

    a, b = run("a", {1: "x", 2: "y", 3: "z"}), run("b", {1: "x", 3: "z", 4: "?"})
    other, later = run("other", {1: "x", 2: "y", 3: "!"}), run("later", {9: "x"})
    assert "the same samples in all 2 logged steps" in compared({"a": a, "b": b})[1]
    assert (
        "the same samples in 2 of 3 logged steps that the runs have in common; step 3"
        in compared({"a": a, "other": other})[1]
    )
    assert "no logged step in common" in compared({"a": a, "later": later})[1]


def test_runs_without_any_row_can_be_compared(tmp_path: Path) -> None:
    _, text = compared({"a": a_run(tmp_path / "a", []), "b": a_run(tmp_path / "b", [train_row(1)])})
    assert "0 of 840 steps" in text


@pytest.mark.parametrize("steps", [100, in_full(2000)])
def test_as_many_runs_as_can_be_told_apart_make_a_page_that_opens(tmp_path: Path, steps: int) -> None:
    rows: list[Any] = [train_row(step, loss=2 + 0.1 * (step % 7)) for step in range(1, steps + 1)]
    run = a_run(tmp_path / "0", rows + [eval_row(step, 0.5) for step in range(1, steps + 1, 10)])
    html = render_comparison([run] * MOST_RUNS, [str(n) for n in range(MOST_RUNS)], [SETTINGS] * MOST_RUNS)
    assert len(html) < 3_000_000
    styles = set(re.findall(r'<li class="(run-\d(?: dash-\d)?)"><svg', html))
    assert len(styles) == MOST_RUNS


def test_runs_are_named_by_as_many_folders_as_tell_them_apart() -> None:
    assert name_runs(["/r/a", "/r/b"]) == ["a", "b"]
    assert name_runs(["/x/1/run", "/y/1/run", "/y/2/run", "/y/2/other"]) == ["x/1/run", "y/1/run", "2/run", "other"]
    assert name_runs(["s3://bucket/a", "s3://other/a"]) == ["bucket/a", "other/a"]
    with pytest.raises(UserError, match="/r/a is given twice: name each run once"):
        name_runs(["/r/a", "/r/b", "/r/a"])
    with pytest.raises(UserError, match="41 runs are too many to tell apart: compare at most 40"):
        name_runs([str(number) for number in range(41)])
