import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastvit_engine.observe.report.recorded_run import load_run
from fastvit_engine.observe.report.report import write_report
from fastvit_engine.observe.run_folder import RunFolder
from tests.fastvit_engine.observe.conftest import MakeRun, eval_row, few_shot_row, png_url, train_row

_VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Parses a report; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)
        if "style" not in self._open:
            self.text += data + " "

    def all(self, tag: str, class_name: str | None = None) -> list[dict[str, str | None]]:
        return [
            attributes
            for name, attributes in self.tags
            if name == tag and (class_name is None or class_name in (attributes.get("class") or "").split())
        ]


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
        *("Throughput", "Images per second", "Use of the hardware"),
        *("Optimisation", "Learning rate", "Gradient norm"),
        "Sample predictions",
        "Record",
    ]
    assert len(page.all("svg")) == 6
    for fact in ("98.8 %", "840 steps of 64 images on 2 processes (cpu, ZeRO-1) in 1 min 12 s", "finished", "412,000",
                 "53,760 images, 37.41 epochs", "210 GFLOP/s (measured)", "300.0 MiB", "torch 2.13.0", "seed: 0",
                 "2026-05-01 10:00 on node-1", "data/digits/train-{000000..000003}.tar"):  # fmt: skip
        assert fact in page.text, fact
    assert "triton None" not in page.text
    assert {"EMA top-1 ", "EMA top-5 "} <= set(re.findall(r"EMA top-\d ", page.text))


def test_nothing_is_fetched_from_anywhere(make_run: MakeRun) -> None:
    run = make_run([train_row(1)], SAMPLES)
    page = page_of(run.path)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "image", "use")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    text = run.report.read_text()
    assert "://" not in text and "@import" not in text and "url(" not in text
    (policy,) = [tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'")


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
    assert page.all("script") == []
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
    assert run.report.stat().st_size < 300_000


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
    charts = len(page.all("svg"))
    assert len(page.all("path", "rewind")) == len(page.all("path", "restart")) == charts
    assert len(page.all("path", "checkpoint")) == 2 * charts
    (left,) = {mark["d"] for mark in page.all("path", "rewind")}
    assert left is not None and left.startswith(f"M{1000 * 150 / 840:.1f} 0V1000")


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
    assert page.all("path", "checkpoint") == []  # 499 ticks would be a bar
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
