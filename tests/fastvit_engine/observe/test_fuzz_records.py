"""Any bytes in the records of a run are reported on or refused in one sentence, in bounded time and memory."""

import json

import pytest
from hypothesis import given, settings

from fastvit_engine.commands.report import settings_of
from fastvit_engine.observe.events import read_events, record_event
from fastvit_engine.observe.metrics import MetricsWriter, read_metrics
from fastvit_engine.observe.report.comparison import render_comparison
from fastvit_engine.observe.report.recorded_run import load_run
from fastvit_engine.observe.report.report import render
from fastvit_engine.observe.run_folder import RunFolder
from tests.fastvit_engine.fuzzing import fuzz, mutated, read_or_refuse
from tests.fastvit_engine.observe.conftest import ENVIRONMENT, MakeRun, eval_row, png_url, train_row

pytestmark = pytest.mark.timeout(3600)

WORDS = [b"NaN", b"1e999", b"-1", b"null", b"true", b"{}", b"99999999999999999999", b'"nan"', b"1e308", b"\\ud800"]
SAMPLE = {"key": "a", "label": 1, "image": png_url(8), "predictions": [[1, 0.9], [0, 0.1]]}
SAMPLES = {"step": 5, "class_names": ["zero", "one"], "samples": [SAMPLE, SAMPLE | {"label": 0}]}
CLASSES = {"step": 5, "eval": "eval", "class_names": None, "classes": [[0, 2, 1], [1, 3, 3]], "confused": [[0, 1, 1]]}
ROWS = [train_row(3), train_row(5), eval_row(5, 0.5)]
METRICS = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
EVENTS = b"".join(
    b'{"time": "2026-01-01T00:00:00+00:00", "event": "%s", "message": "x", "host": "h", "step": 3}\n' % event
    for event in (b"start", b"rewind", b"checkpoint", b"start", b"anomaly")
)


def compare(run: RunFolder) -> str:
    """A page that compares a run with itself."""
    read = load_run(run.path)
    return render_comparison([read, read], ["a", "b"], [settings_of(read)] * 2)


rendered = settings(fuzz, max_examples=fuzz.max_examples // 8)  # a page takes long


@pytest.fixture
def run(make_run: MakeRun) -> RunFolder:
    return make_run(ROWS)


@fuzz
@given(content=mutated([METRICS], WORDS))
def test_metrics(run: RunFolder, content: bytes) -> None:
    run.metrics.write_bytes(content)
    rows = read_or_refuse(lambda: read_metrics(run.metrics))
    assert rows is not None, "a damaged line is left out"
    assert read_or_refuse(lambda: load_run(run.path).summary()) is not None
    MetricsWriter(run, 4).write(train_row(5))
    train, _ = read_metrics(run.metrics)
    assert [row["step"] for row in train] == [row["step"] for row in rows[0] if row["step"] <= 4] + [5]


@fuzz
@given(content=mutated([EVENTS], WORDS))
def test_events(run: RunFolder, content: bytes) -> None:
    run.events.write_bytes(content)
    events = read_or_refuse(lambda: read_events(run))
    assert events is not None
    assert read_or_refuse(lambda: load_run(run.path).summary()) is not None
    record_event(run, "stop", "the next start")
    assert read_events(run)[:-1] == events and read_events(run)[-1]["message"] == "the next start"


@rendered
@given(metrics=mutated([METRICS], WORDS), events=mutated([EVENTS], WORDS))
def test_reports_of_damaged_lines(run: RunFolder, metrics: bytes, events: bytes) -> None:
    run.metrics.write_bytes(metrics)
    run.events.write_bytes(events)
    for write in (lambda: render(load_run(run.path)), lambda: compare(run)):
        page = read_or_refuse(write)
        assert page is not None and page.startswith("<!DOCTYPE html>")


@rendered
@given(content=mutated([json.dumps(SAMPLES).encode(), json.dumps(CLASSES).encode(), b"seed: 0\n"], WORDS))
def test_samples_classes_and_configurations(run: RunFolder, content: bytes) -> None:
    for path in (run.samples, run.classes):
        path.write_bytes(content)
        run.config.write_bytes(content)
        read_or_refuse(lambda: render(load_run(run.path)))
        path.unlink()
    assert read_or_refuse(lambda: compare(run)) is not None


@rendered
@given(content=mutated([json.dumps(ENVIRONMENT).encode()], WORDS))
def test_environments(run: RunFolder, content: bytes) -> None:
    run.environment.write_bytes(content)
    read_or_refuse(lambda: render(load_run(run.path)))
    read_or_refuse(lambda: compare(run))
    read_or_refuse(lambda: load_run(run.path).summary())
