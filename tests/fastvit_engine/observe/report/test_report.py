import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastvit_engine.errors import UserError
from fastvit_engine.observe.report.recorded_run import load_run
from fastvit_engine.observe.report.report import _tiles, render, write_report
from fastvit_engine.observe.run_folder import RunFolder
from tests.fastvit_engine.observe.conftest import (
    MakeRun,
    eval_row,
    few_shot_row,
    loss_row,
    own_row,
    png_url,
    train_row,
)
from tests.fastvit_engine.observe.report.page_parser import Page


def page_of(run_path: Path) -> Page:
    return Page(write_report(load_run(run_path)).read_text(encoding="utf-8"))


def sample(key: str, label: int, width: int, predictions: list[tuple[int, float]]) -> dict[str, Any]:
    return {"key": key, "label": label, "image": png_url(width), "predictions": predictions}


SAMPLES = {
    "step": 840,
    "class_names": ["zero", '<b>bold</b> & "quoted"'],
    "samples": [
        sample("right", 1, 8, [(1, 0.75), (0, 0.25)]),
        sample("wrong", 0, 224, [(1, 0.6), (0, 0.4)]),
    ],
}


def test_a_finished_run_has_every_section(make_run: MakeRun) -> None:
    rows: list[Any] = [train_row(step) for step in range(1, 841)]
    rows += [eval_row(step, 1 - 10 / step) for step in (420, 840)]
    rows += [eval_row(step, 0.5, eval="eval_ema") for step in (420, 840)]
    run = make_run(rows, SAMPLES)
    assert write_report(load_run(run.path)) == run.report
    page = page_of(run.path)
    assert page.headings == [
        "ViT Ti/4",
        *("Learning", "Loss", "Accuracy"),
        *("Throughput", "Images per second", "Use of the hardware", "Memory"),
        *("Optimisation", "Learning rate", "Gradient norm"),
        "Sample predictions",
        "Record",
    ]
    assert len(page.all("figure", "chart")) == 7
    page.check()
    for fact in ("98.8 %", "840 steps of 64 images on 2 processes (cpu, ZeRO-1) in 1 min 12 s", "finished", "412,000",
                 "53,760 images, 37.41 epochs", "210 GFLOP/s (measured)", "300.0 MiB", "torch 2.13.0", "seed: 0",
                 "2026-05-01 10:00 on node-1", "data/digits/train-{000000..000003}.tar"):  # fmt: skip
        assert fact in page.text, fact
    assert "triton None" not in page.text
    assert {"EMA top-1 ", "EMA top-5 "} <= set(re.findall(r"EMA top-\d ", page.text))


def test_an_evaluator_of_ones_own_has_a_chart_with_a_line_per_figure(make_run: MakeRun) -> None:
    rows: list[Any] = [train_row(840)]
    rows += [own_row(step, name, recall=0.5, margin=step / 840) for step in (420, 840) for name in ("mine", "mine_ema")]
    page = page_of(make_run(rows).path)
    assert "mine" in page.headings and "mine_ema" not in page.headings
    for line in ("recall", "margin", "EMA recall", "EMA margin"):
        assert line in page.text
    page.check()


@pytest.mark.parametrize(
    ("top1", "remark"),
    [
        ([0.9], "360 held-out images"),
        ([0.9, 0.95], "360 held-out images; the best of the run"),
        ([0.95, 0.9], "360 held-out images; best 95.0 % at step 10"),
    ],
)
def test_the_last_evaluation_is_compared_with_the_others(make_run: MakeRun, top1: list[float], remark: str) -> None:
    run = make_run([train_row(20), *(eval_row(10 * number, one) for number, one in enumerate(top1, 1))])
    (tile,) = [tile for tile in _tiles(load_run(run.path)) if tile.name == "top-1"]
    assert tile.remark == remark


def test_nothing_is_fetched_from_anywhere(make_run: MakeRun) -> None:
    run = make_run([train_row(1)], SAMPLES)
    page_of(run.path).check()
    text = run.report.read_text()
    assert "://" not in text and "@import" not in text and "url(" not in text


def test_sample_predictions(make_run: MakeRun) -> None:
    run = make_run([train_row(840)], SAMPLES)
    page = page_of(run.path)
    assert "1 of 2 held-out images right at step 840" in page.text
    assert len(page.all("li", "sample")) == 2
    assert len(page.all("li", "wrong")) == 1
    small, large = page.all("img")
    assert small.get("class") == "small" and large.get("class") is None  # 8 pixels wide, and 224
    assert [bar["style"] for bar in page.all("i")] == ["width:75.0%", "width:25.0%", "width:60.0%", "width:40.0%"]
    assert small["alt"] == '<b>bold</b> & "quoted"'  # escaped once: the parser gives it back as it was
    assert page.all("b") == [{}] * len(page.all("b")) and "<b>bold" not in run.report.read_text()


def test_text_from_files_is_escaped(make_run: MakeRun) -> None:
    hostile = '</pre><script>alert("x")</script>'
    run = make_run([train_row(1)], config=f"name: {hostile}\n", shards=hostile, model=hostile, device=hostile)
    page = page_of(run.path)
    page.check()  # no script but the page's own
    assert page.text.count(hostile) >= 4


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 19, 20, 21])
def test_a_run_of_few_rows(make_run: MakeRun, steps: int) -> None:
    page = page_of(make_run([train_row(step) for step in range(1, steps + 1)]).path)
    assert "has not been evaluated" in page.text or steps == 0
    assert ("No step has been logged yet." in page.text) == (steps == 0)
    assert "The run has left no sample predictions." in page.text
    assert f"{steps} of 840 steps ({100 * steps // 840} %)" in page.text


def test_a_run_of_many_rows_makes_a_small_page(make_run: MakeRun) -> None:
    run = make_run([train_row(step) for step in range(1, 20_001)], total_steps=20_000)
    page_of(run.path)
    assert run.report.stat().st_size < 400_000


def test_what_is_unknown_is_said(make_run: MakeRun) -> None:
    rows = [train_row(step, mfu=None, grad_norm=None) for step in (1, 2, 3)]
    page = page_of(make_run(rows, config=None, peak_flops=None, samples_per_epoch=None).path)
    assert "MFU is unknown" in page.text
    assert "Not recorded." in page.text  # the gradient norm
    assert "no config.yaml" in page.text


def test_a_loss_that_is_not_finite_is_said(make_run: MakeRun) -> None:
    rows: list[Any] = [train_row(step) for step in range(1, 30)] + [train_row(30) | {"loss": "nan"}]
    assert "not finite in 1 of 30 logged steps" in page_of(make_run(rows).path).text


def test_few_classes_have_no_top5(make_run: MakeRun) -> None:
    page = page_of(make_run([train_row(1), eval_row(1, 0.5, top5=None)]).path)
    assert "top-1" in page.text and "top-5" not in page.text


def test_a_diverged_run_still_has_a_report(make_run: MakeRun) -> None:
    rows = [train_row(step) | {"loss": "nan", "grad_norm": "inf"} for step in range(1, 30)]
    rows.append(eval_row(29, 0.1) | {"loss": "nan"})
    page = page_of(make_run(rows).path)
    assert "not finite in 29 of 29 logged steps" in page.text
    assert "Not recorded." in page.text


def event(kind: str, step: int, message: str = "something", second: int = 0, **facts: Any) -> dict[str, Any]:
    time = f"2026-05-01T10:{second // 60:02}:{second % 60:02}.000+02:00"
    return {"time": time, "event": kind, "message": message, "host": "node-1", "rank": 0, "step": step, **facts}


def write_events(run: RunFolder, events: list[dict[str, Any]]) -> None:
    run.events.write_text("".join(json.dumps(row) + "\n" for row in events))


INCIDENTS = [
    event("start", 0),
    event("checkpoint", 100, second=10),
    event("anomaly", 150, "the loss is nan: <rank 1>", second=20),
    event("rewind", 100, "back to step-00000100", second=21, from_step=150, to_step=100),
    {key: value for key, value in event("restart", 0, "again", second=30).items() if key not in ("rank", "step")},
    event("start", 100, second=40),
    event("checkpoint", 200, second=50),
    event("stop", 840, "finished after 840 steps", second=60),
]


def test_events_are_a_table_marks_and_a_tile(make_run: MakeRun) -> None:
    run = make_run([train_row(step) for step in range(1, 841)])
    write_events(run, INCIDENTS)
    page = page_of(run.path)
    assert "Events" in page.headings
    assert "restarts and rewinds" in page.text and "1 restart, 1 rewind, 1 anomaly" in page.text
    assert "2 checkpoints saved" in page.text
    shown, every = (len(rows) for rows in table_rows(run))
    assert (shown, every) == (6, 8)  # checkpoints are in the folded table only
    for text in ("2026-05-01 10:00:20", "the loss is nan: <rank 1>", "launcher, node-1", "rank 0, node-1", "anomaly"):
        assert text in page.text, text
    charts = len(page.all("figure", "chart"))  # the timeline among them
    assert len(page.all("path", "rewind")) == len(page.all("path", "restart")) == charts
    assert len(page.all("path", "checkpoint")) == 2 * charts
    lefts = {(mark["d"] or "").split()[0] for mark in page.all("path", "rewind")}
    assert lefts == {f"M{1000 * 150 / 840:.1f}"}


def test_a_run_without_incidents(make_run: MakeRun) -> None:
    run = make_run([train_row(1)])
    assert "Events" not in page_of(run.path).headings
    write_events(run, [event("start", 0), event("stop", 840)])
    page = page_of(run.path)
    assert "No incident; 0 checkpoints saved." in page.text and "restarts and rewinds" not in page.text
    assert [len(rows) for rows in table_rows(run)] == [2]
    run.metrics.write_text("")
    page_of(run.path)


def test_many_events_stay_readable(make_run: MakeRun) -> None:
    """One failure, then a flood of one kind: the flood is one row, and the failure is still there to see."""
    run = make_run([train_row(step) for step in range(1, 841)])
    flood = [event("slow_rank", step, f"rank {step} is slow", second=step) for step in range(300)]
    saved = [event("checkpoint", step, second=step) for step in range(1, 500)]
    write_events(run, [event("start", 0), event("failure", 1, "rank 3 is gone"), *flood, *saved])
    page = page_of(run.path)
    shown, every = table_rows(run)
    assert len(shown) == 3 and len(every) == 801
    assert "rank 3 is gone" in shown[1]
    assert "rank 299 is slow (and 299 such before, from 2026-05-01 10:00:00 on)" in shown[2]
    ticks = [mark for mark in page.all("path", "checkpoint") if (mark["d"] or "").endswith("V1000")]
    assert ticks == []  # 499 would be a bar
    assert run.report.stat().st_size < 400_000
    alternating = [event(kind, step) for step in range(100) for kind in ("anomaly", "rewind")]
    write_events(run, alternating)
    page_of(run.path)
    shown, every = table_rows(run)
    assert (len(shown), len(every)) == (25, 200)
    assert "The newest 25 of 200 rows" in page_of(run.path).text


def test_events_with_few_facts(make_run: MakeRun) -> None:
    """A launcher before any step, and a time that is none: shown as they are."""
    run = make_run([train_row(1)])
    write_events(run, [{"time": "yesterday", "event": "restart", "message": "again"}])
    assert "yesterday" in page_of(run.path).text


def table_rows(run: RunFolder) -> list[list[str]]:
    """The rows of each table of the report, as text."""
    tables = re.findall(r"<tbody>(.*?)</tbody>", run.report.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [[re.sub(r"<[^>]*>", " ", row) for row in table.split("</tr>")[:-1]] for table in tables]


def test_few_shot_accuracy_has_a_line_per_number_of_shots(make_run: MakeRun) -> None:
    rows = [train_row(1), *(few_shot_row(step, 0.1 * step, 0.2 * step) for step in (1, 2))]
    page = page_of(make_run([*rows, few_shot_row(2, 0.125, eval="fewshot_ema")]).path)
    assert "Few-shot accuracy" in page.headings
    text = " ".join(page.text.split())
    assert "1-shot 20.0 % 5-shot 40.0 %" in text and "EMA 1-shot 12.5 %" in text and "EMA 5-shot" not in text


def test_a_run_without_labels_shows_its_held_out_loss(make_run: MakeRun) -> None:
    rows = [train_row(1), *(loss_row(step, 1 / step) for step in (1, 2)), loss_row(2, 0.75, eval="eval_ema")]
    run = load_run(make_run(rows, objective="mae", total_steps=2).path)
    page = page_of(run.folder.path)
    text = " ".join(page.text.split())
    assert "held-out loss 0.5 at step 2" in text and "squared error of hidden pixels" in text
    assert not {"Accuracy", "Sample predictions"} & {*page.headings} and "has not been evaluated" not in text
    assert run.describe_accuracy() == [
        "loss 0.5 on 360 held-out images",
        "loss of the EMA weights 0.75 on 360 held-out images",
    ]
    assert run.step == 2 and run.finished


def test_reconstructions_are_shown_in_place_of_predictions(make_run: MakeRun) -> None:
    run = make_run([train_row(1), loss_row(1, 0.5)], objective="mae")
    pictures = [{"key": "a<b>", "image": png_url(48)}, {"key": "c", "image": png_url(672)}]
    run.reconstructions.write_text(json.dumps({"step": 1200, "eval": "eval_ema", "pictures": pictures}))
    page = page_of(run.path)
    assert "Reconstructions" in page.headings and "Sample predictions" not in page.headings
    assert "at step 1,200, by the EMA weights: what the encoder sees" in " ".join(page.text.split())
    html = run.report.read_text(encoding="utf-8")
    small, large = (html.index(picture["image"]) for picture in pictures)
    assert 'class="small"' in html[small - 30 : small] and 'class="small"' not in html[large - 30 : large]
    assert "<b>: seen" not in html


@pytest.mark.parametrize("picture", [{}, {"key": "a", "image": "https://host/a.png"}, {"key": "a", "image": 3}])
def test_damaged_reconstructions_are_refused(make_run: MakeRun, picture: dict[str, Any]) -> None:
    run = make_run([train_row(1)])
    run.reconstructions.write_text(json.dumps({"step": 1, "eval": "eval", "pictures": [picture]}))
    with pytest.raises(UserError, match=r"reconstructions\.json does not hold pictures"):
        load_run(run.path)


def test_figures_of_inspect_are_shown_for_light_and_dark_pages(make_run: MakeRun) -> None:
    run = make_run([train_row(1)])
    run.inspection.mkdir()
    widths = {"rollout": 8, "rollout-dark": 9, "filters": 10, "unknown": 11, "unknown-dark": 12}
    for name, width in widths.items():
        (run.inspection / f"{name}.png").write_bytes(base64.b64decode(png_url(width).partition(",")[2]))
    page = page_of(run.path)
    assert "What the model has learned" in page.headings
    assert [image["alt"] for image in page.all("img")] == ["attention rollout"]  # of filters there is no dark one
    assert page.all("img")[0]["src"] == png_url(8) and page.all("source")[0]["srcset"] == png_url(9)


def test_a_figure_that_is_no_picture_is_refused(make_run: MakeRun) -> None:
    run = make_run([train_row(1)])
    run.inspection.mkdir()
    for name in ("rollout", "rollout-dark"):
        (run.inspection / f"{name}.png").write_text("<svg>")
    with pytest.raises(UserError, match=r"inspect/rollout\.png is not a PNG: remove it, or make it again with"):
        load_run(run.path)


def test_few_shot_figures_are_a_table_too(make_run: MakeRun) -> None:
    rows = [few_shot_row(1, 0.1), few_shot_row(2, 0.25, 0.5), few_shot_row(2, 0.125, eval="fewshot_ema")]
    page = page_of(make_run([train_row(2), *rows]).path)
    text = " ".join(page.text.split())
    assert "weights 25.0 % ± 1.0 50.0 % ± 1.0 2 360 images EMA weights 12.5 % ± 1.0 2 360 images" in text


def test_the_time_of_a_step_is_divided_into_its_parts(make_run: MakeRun) -> None:
    parts = {"forward": 0.25, "backward": 0.5, "update": 0.1}
    warming = train_row(1, seconds=100.0, data_wait=0.9, forward=0.05, backward=0.0, update=0.0)
    rows = [warming, *(train_row(step, seconds=100.0 + 0.2 * step, data_wait=0.05, **parts) for step in (11, 21))]
    page = page_of(make_run(rows).path)
    assert "Where the time of a step goes" in page.headings and "Parts of a step" in page.headings
    text = " ".join(page.text.split())
    assert "210 ms per step" in text  # from step 1 to 21: the first row is left out
    for share in ("waiting for data 5.0 % 10.5 ms", "forward 25.0 % 52.5 ms", "backward 50.0 % 105 ms",
                  "update 10.0 % 21 ms", "everything else 10.0 % 21 ms"):  # fmt: skip
        assert share in text, share


def test_an_older_run_has_no_parts_of_a_step(make_run: MakeRun) -> None:
    page = page_of(make_run([train_row(1), train_row(2)]).path)
    assert "Parts of a step" not in page.headings and "Where the time of a step goes" not in page.headings


def profile(**changes: Any) -> str:
    line = {"name": "<gemm>", "seconds": 0.03, "share": 0.75, "calls": 30, "kind": "matrix products"}
    whole = {"steps": [10, 11], "rank": 3, "host": "node-1", "device": "cpu", "kinds": [line], "kernels": [line] * 50}
    return json.dumps(whole | changes)


def test_profiles_are_tables(make_run: MakeRun) -> None:
    run = make_run([train_row(840)])
    (run.path / "profile").mkdir()
    path = run.path / "profile" / "rank-3-steps-10-11.json"
    path.write_text(profile())
    page = page_of(run.path)
    page.check()
    text = " ".join(page.text.split())
    assert "Profile by kind Mean of 2 steps from step 10 on, rank 3 on node-1 (cpu)." in text
    assert "The 20 of 50 kernels" in text and text.count("<gemm> 15 75.0 % 15") == 21
    for damaged in ("[]", profile(steps=[]), profile(kernels=[{}]), profile(kinds=5), "{"):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"rank-3-steps-10-11\.json (does not hold the tables|is not valid JSON)"):
            load_run(run.path)


CLASSES = {
    "step": 840,
    "eval": "eval_ema",
    "class_names": ["cat", "<i>dog</i>", "owl"],
    "classes": [[0, 4, 4], [1, 4, 1], [2, 2, 1]],
    "confused": [[1, 0, 3], [2, 1, 1]],
}


def test_classes_are_shown_from_the_weakest_on_and_what_they_are_taken_for(make_run: MakeRun) -> None:
    run = make_run([train_row(840)])
    assert "Classes" not in page_of(run.path).headings
    run.classes.write_text(json.dumps(CLASSES))
    page = page_of(run.path)
    page.check()
    text = " ".join(page.text.split())
    assert "3 classes at step 840, by the EMA weights; 1 of them without a mistake." in text
    assert "<i>dog</i> 25.0 % of 4 owl 50.0 % of 2 cat 100.0 % of 4" in text
    assert "<i>dog</i> taken for cat 3 × 75.0 % of its images owl taken for <i>dog</i> 1 × 50.0 % of its images" in text


def test_of_many_classes_the_weakest_are_shown(make_run: MakeRun) -> None:
    run = make_run([train_row(840)])
    many = {"class_names": None, "classes": [[n, 1000, n % 1000] for n in range(2000)], "confused": []}
    run.classes.write_text(json.dumps(CLASSES | many))
    page = page_of(run.path)
    assert "2,000 classes" in page.text and "The 30 weakest:" in page.text
    assert "class 0" in page.text and "class 14" in page.text and "class 15" not in page.text
    assert "No image was taken for another class." in page.text
    assert run.report.stat().st_size < 200_000


def test_incidents_have_a_timeline_and_planned_starts_are_none(make_run: MakeRun) -> None:
    run = make_run([train_row(100, bad_samples=0), train_row(200, bad_samples=3), train_row(300, bad_samples=3)])
    stop = event("stop", 100, "stopped on request", reason="preempted")
    write_events(run, [event("start", 0), stop, event("start", 100), event("hang", 150, "rank 3 is <late>")])
    page = page_of(run.path)
    text = " ".join(page.text.split())
    assert "1 hang, 3 bad samples; 0 checkpoints saved; started again as planned 1 time." in text
    assert (
        "Timeline hang bad samples planned start" in text and "step 150, 2026-05-01 10:00:00: rank 3 is <late>" in text
    )
    assert "step 200, 3 bad samples up to step 200" in text
    (planned,) = page.all("path", "planned")
    assert planned["data-step"] == "100" and (planned["d"] or "").startswith(f"M{1000 * 100 / 300:.1f} ")


def test_charts_can_begin_with_another_axis(make_run: MakeRun) -> None:
    rows = [train_row(step, samples=10 * step**2, seconds=36.0 * step**2) for step in (1, 2, 4)]
    run = load_run(make_run(rows, training_flops_per_image=1e9).path)
    shown = {}
    for axis in ("steps", "samples", "hours", "flops"):
        text = render(run, axis)
        Page(text).check()
        (corners,) = re.findall(r'aria-label="Learning rate.*?class="line train" d="([^"]*)"', text)
        lefts = [float(left) for left in re.findall(r"[ML]([\d.]+) ", corners)]
        (name,) = set(re.findall(r'<div class="axis">(.*?)</div>', text))
        (ticks,) = set(re.findall(r'<div class="columns">(.*?)</div>', text))
        shown[axis] = (lefts, name, re.findall(r">([^<]*)</span>", ticks))
    squares = [62.5, 250, 1000]
    assert shown == {
        "steps": ([250, 500, 1000], "step", ["0", "1", "2", "3", "4"]),
        "samples": (squares, "training images", ["0", "50", "100", "150"]),
        "hours": (squares, "minutes of training", ["0", "2", "4", "6", "8"]),
        "flops": (squares, "training FLOPs", ["0", "50G", "100G", "150G"]),
    }
