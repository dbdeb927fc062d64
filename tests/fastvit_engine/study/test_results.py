"""study.json, table.md and the picture of a study."""

import json
from statistics import mean, pstdev

import pytest

from fastvit_engine.study.figure import draw
from fastvit_engine.study.results import Results


def record_of(run, top1=0.5, **facts):
    few_shot = {} if top1 is None else {"top1": top1, "fewshot5": top1 / 2, "samples": 10_000}
    return {
        "state": "finished",
        "label": run.variant.label,
        "recipe": run.recipe,
        "settings": run.settings,
        "exaflops": run.exaflops,
        "command": "fastvit train",
        **few_shot,
        **facts,
    }


@pytest.fixture
def results(plan):
    """Of a study with two seeds; the first variant has one run that failed, the last was not begun with seed 1."""
    study, runs = plan(seeds=2, title="Pools & rates", figure={"x": "optimizer.learning_rate", "lines": "model.pool"})
    tops = [0.5, 0.6, 0.7, 0.8, None, 0.62, 0.74]
    records = {run.name: record_of(run, top1) for run, top1 in zip(runs, tops, strict=False)}
    records[runs[4].name] |= {"state": "failed", "failed": "it | diverged"}
    return Results(study, runs, records)


def test_the_json_has_every_run_that_ended(results):
    found = results.as_json()
    assert found["planned"] == 8 and len(found["runs"]) == 7
    assert found["runs"][1] == {
        "settings": {"model.pool": "cls", "optimizer.learning_rate": 0.01, "seed": 0},
        "exaflops": results.runs[1].exaflops,
        "top1": 0.6,
        "fewshot5": 0.3,
        "samples": 10_000,
        "recipe": "quickstart",
        "command": "fastvit train",
    }
    failed = found["runs"][4]
    assert (failed["failed"], failed["top1"], failed["fewshot5"]) == ("it | diverged", None, None)


def test_the_table_has_mean_and_deviation_over_the_seeds(results):
    lines = results.table().splitlines()
    assert lines[0] == "# Pools & rates"
    assert (
        "on 10,000 images: mean and standard deviation (of the population) over 2 seeds; the best mean is" in lines[2]
    )
    assert "6 of 8 runs are finished." in lines[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0][:2] == ["`pool`", "`learning_rate`"] and rows[0][3:] == ["top-1", "5-shot", "runs finished"]
    assert {len(row) for row in rows} == {6}
    assert rows[2][3:] == ["50.0 %", "25.0 %", "1 of 2, 1 failed"]
    assert rows[3][3] == f"{100 * mean([0.6, 0.62]):.1f} % ± {100 * pstdev([0.6, 0.62]):.1f}"
    assert rows[5][3:] == ["**80.0** %", "**40.0** %", "1 of 2"]
    assert "* pool=cls, learning_rate=0.001, seed 1: it | diverged" in lines


def test_one_seed_has_no_deviation(plan):
    study, runs = plan()
    results = Results(study, runs, {run.name: record_of(run) for run in runs})
    assert "one seed, so nothing is known of their spread" in results.table() and "±" not in results.table()
    assert "finished" not in results.table()


def test_without_a_finished_run_there_is_a_table_and_no_picture(plan, tmp_path):
    study, runs = plan()
    results = Results(study, runs, {})
    assert draw(results, tmp_path) == []
    results.write(tmp_path)
    assert json.loads((tmp_path / "study.json").read_text())["runs"] == []
    assert "0 of 4 runs are finished" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("keys", "texts"),
    [
        ({"figure": {"x": "optimizer.learning_rate", "lines": "model.pool", "log": True}}, ["pool cls", "pool gap"]),
        ({"figure": {"x": "model.pool", "lines": "optimizer.learning_rate"}}, ["cls", "gap", "learning_rate 0.01"]),
        ({"figure": {"x": "exaflops"}}, ["gigaFLOP of the training"]),
        (
            {
                "runs": [{}, {"label": "depth", "model.depth": [1, 3]}, {"label": "width", "model.width": [16, 64]}],
                "figure": {"x": "exaflops", "lines": "label"},
            },
            ["depth", "width"],
        ),
        ({"shots": None}, ["top-1 (%)"]),
    ],
)
def test_the_picture_says_what_it_shows(plan, tmp_path, keys, texts):
    study, runs = plan(seeds=2, title="A title", **keys)
    records = {run.name: record_of(run, 0.3 + 0.05 * run.number) for run in runs}
    if study.shots is None:
        for record in records.values():
            del record["fewshot5"]
    paths = draw(Results(study, runs, records), tmp_path)
    assert sorted(path.name for path in paths) == ["tiny-dark.png", "tiny-dark.svg", "tiny.png", "tiny.svg"]
    assert all(path.stat().st_size > 5000 for path in paths)
    svg = (tmp_path / "tiny.svg").read_text()
    comments = [line.strip()[5:-4] for line in svg.splitlines() if line.strip().startswith("<!-- ")]
    for text in ["A title", "top-1 (%)", "mean ± standard deviation of 2 seeds", *texts]:
        assert text in comments
    assert ("5-shot accuracy (%)" in comments) == (study.shots is not None)


def test_lines_meet_at_the_run_without_a_label(plan):
    from fastvit_engine.study.figure import _lines

    study, runs = plan(runs=[{}, {"label": "depth", "model.depth": [1, 3]}, {"label": "width", "model.width": 64}])
    rows = Results(study, runs, {run.name: record_of(run) for run in runs}).rows()
    lines = _lines("label", rows)
    assert {name: [row.settings for row in line] for name, line in lines.items()} == {
        "depth": [{"model.depth": 1}, {"model.depth": 3}, {}],
        "width": [{"model.width": 64}, {}],
    }


def test_the_table_leaves_out_what_a_label_says(plan):
    runs = [
        {},
        {"label": "depth", "model.depth": [1, 3], "model.pool": "gap"},
        {"label": "width", "model.width": 16, "model.heads": 1, "model.pool": "gap"},
        {"label": "width", "model.width": 64, "model.heads": 2, "model.pool": "gap"},
        {"label": "pool", "model.pool": "map", "model.depth": None},
    ]
    study, planned = plan(runs=runs)
    assert [run.title for run in planned] == [
        "quickstart, seed 0",
        "depth: depth=1, seed 0",
        "depth: depth=3, seed 0",
        "width: width=16, heads=1, seed 0",
        "width: width=64, heads=2, seed 0",
        "pool, seed 0",
    ]
    assert planned[5].name == "pool_pool-map_seed-0"
    lines = [line for line in Results(study, planned, {}).table().splitlines() if line.startswith("|")]
    assert lines[0].startswith("|  | `depth` | `width` | `heads` | ")
    assert [line.split("|")[1:5] for line in lines[2:]] == [
        [" quickstart ", "  ", "  ", "  "],
        [" depth ", " 1 ", "  ", "  "],
        [" depth ", " 3 ", "  ", "  "],
        [" width ", "  ", " 16 ", " 1 "],
        [" width ", "  ", " 64 ", " 2 "],
        [" pool ", "  ", "  ", "  "],
    ]
