"""One HTML file that shows a run: self-contained, opens from disk, reads well on a phone and on paper."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

import fastvit_engine
from fastvit_engine.files import atomic_write
from fastvit_engine.observe.events import Event
from fastvit_engine.observe.metrics import FewShotRow, TrainRow
from fastvit_engine.observe.report.chart import Array, Mark, Series, line_chart
from fastvit_engine.observe.report.recorded_run import RecordedRun, best_evaluation
from fastvit_engine.observe.units import format_bytes, format_duration, format_flops, format_share

_SMALL_IMAGE = 96  # pixels; below it the report shows an image larger than it is, and its pixels as squares
_EVENTS_SHOWN = 25
_SHOT_STYLES = 4  # colours of few-shot lines, in the style sheet
_TICKS_UP_TO = 100  # checkpoints; more are a bar at the bottom of every chart
_KINDS = (("eval", "held-out", "eval"), ("eval_ema", "held-out, EMA weights", "ema"))  # row kind, name, style class


class _Section(NamedTuple):
    """Charts under a heading."""

    title: str
    note: str
    charts: list[Markup]


class _Tile(NamedTuple):
    name: str
    figure: str
    remark: str


class _EventRow(NamedTuple):
    """An event as the table shows it."""

    severity: str  # class in the style sheet
    when: str
    what: str
    step: str
    message: str
    who: str


class _Events(NamedTuple):
    note: str
    newest: list[_EventRow]
    all: list[_EventRow]  # empty if the newest are all


def write_report(run: RecordedRun) -> Path:
    """Writes `report.html` into the folder of a run, finished or in progress, and returns its path."""
    atomic_write(run.folder.report, render(run))
    return run.folder.report


def render(run: RecordedRun) -> str:
    """The report as HTML."""
    environment, done = run.environment, 100 * run.step // run.environment["total_steps"]
    return _template().render(
        style=Markup(_resource("style.css")),
        name=run.folder.name,
        model=run.describe_model(),
        training=run.describe_training(),
        progress="" if run.finished else f"{run.step:,} of {environment['total_steps']:,} steps ({done} %)",
        tiles=_tiles(run),
        facts=_facts(run),
        sections=[_learning(run), _throughput(run), _optimisation(run)],
        events=_events(run),
        samples=run.samples,
        small_image=_SMALL_IMAGE,
        config=run.config if run.config is not None else "The run folder has no config.yaml.",
        environment=json.dumps(environment, indent=2, ensure_ascii=False),
        version=fastvit_engine.__version__,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["percent"] = format_share
    environment.filters["thousands"] = "{:,}".format
    environment.filters["bar_width"] = lambda probability: f"{100 * min(1.0, max(0.0, probability)):.1f}"
    return environment.from_string(_resource("report.html.jinja"))


def _resource(name: str) -> str:
    return (resources.files("fastvit_engine.observe.report") / name).read_text(encoding="utf-8")


def _tiles(run: RecordedRun) -> list[_Tile]:
    tiles: list[_Tile] = []
    for kind, name in (("eval", "top-1"), ("eval_ema", "top-1, EMA weights")):
        if rows := run.evaluations_of(kind):
            final, best = rows[-1], best_evaluation(rows)
            when = "the best" if best is final else f"best {format_share(best['top1'])} at step {best['step']:,}"
            tiles.append(_Tile(name, format_share(final["top1"]), f"{final['samples']:,} held-out images; {when}"))
    if rows := run.evaluations_of("eval"):
        tiles.append(_Tile("held-out loss", _short(rows[-1]["loss"]), f"at step {rows[-1]['step']:,}"))
    elif run.train:
        tiles.append(_Tile("training loss", _short(run.train[-1]["loss"]), f"at step {run.train[-1]['step']:,}"))
    if run.train:
        tiles.append(_Tile("throughput", f"{_median(run, 'images_per_second'):,.0f}", "images/s, median"))
        mfu = _median(run, "mfu")
        if np.isfinite(mfu):
            tiles.append(_Tile("MFU", format_share(mfu), "of peak FLOP/s, median"))
        if incidents := run.describe_incidents():
            count = len(run.restarts) + len(run.events_of("rewind"))
            tiles.append(_Tile("restarts and rewinds", f"{count:,}", incidents))
        tiles.append(_Tile("training time", format_duration(run.seconds), f"{run.train[-1]['samples']:,} images"))
    return tiles


def _facts(run: RecordedRun) -> list[tuple[str, str]]:
    environment = run.environment
    per_epoch, peak = environment["samples_per_epoch"], environment["peak_flops"]
    started = datetime.fromisoformat(environment["started"])
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    facts = {
        "Parameters": f"{environment['parameters']:,}",
        "Training data": environment["shards"] + (f" ({per_epoch:,} images)" if per_epoch else ""),
        "Seen": _seen(run.train[-1]) if run.train else None,
        "Global batch": f"{environment['global_batch_size']:,} images",
        "Precision": environment["precision"],
        "Device": environment["device"],
        "Processes": f"{environment['world_size']:,}, DeepSpeed ZeRO stage {environment['zero_stage']}",
        "Compute": f"{format_flops(environment['training_flops_per_image'])} per image, forward and backward",
        "Peak": f"{format_flops(peak)}/s ({environment['peak_flops_source']})" if peak else "unknown: no MFU",
        "Peak memory": format_bytes(max(row["memory_bytes"] for row in run.train)) + " per process"
        if run.train
        else None,
        "Started": f"{started:%Y-%m-%d %H:%M} on {environment['hostname']}",
        "Versions": versions,
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _seen(row: TrainRow) -> str:
    return f"{row['samples']:,} images" + ("" if row["epoch"] is None else f", {row['epoch']:,.2f} epochs")


def _learning(run: RecordedRun) -> _Section:
    marks = _marks(run)
    loss = [_series("training", "train", run.train, "loss", noisy=True)]
    accuracy: list[Series] = []
    for kind, name, style in _KINDS:
        rows = run.evaluations_of(kind)
        loss.append(_series(name, style, rows, "loss", points=True))
        short = "EMA " if kind == "eval_ema" else ""
        accuracy.append(_series(f"{short}top-1", style, rows, "top1", scale=100, points=True))
        accuracy.append(_series(f"{short}top-5", style, rows, "top5", scale=100, dashed=True))
    charts = [line_chart("Loss", "cross-entropy, nats per image", loss, form=_short, marks=marks)]
    if run.evaluations:
        charts.append(line_chart("Accuracy", "% of held-out images", accuracy, form="{:.1f} %".format, marks=marks))
    if run.few_shot:
        lines = _few_shot(run.few_shot)
        unit = "% of images, by a linear classifier on the features"
        charts.append(line_chart("Few-shot accuracy", unit, lines, form="{:.1f} %".format, marks=marks))
    note = "" if run.evaluations else "The run has not been evaluated on held-out images."
    broken = sum(not np.isfinite(row["loss"]) for row in run.train)
    if broken:
        note += f" The training loss is not finite in {broken:,} of {len(run.train):,} logged steps."
    return _section("Learning", charts if run.train or run.evaluations or run.few_shot else [], note)


def _few_shot(rows: Sequence[FewShotRow]) -> list[Series]:
    """A line per number of shots, for the weights and, dashed, for their average."""
    numbers = sorted({int(shots) for row in rows for shots in row["shots"]})
    lines = []
    for kind, prefix in (("fewshot", ""), ("fewshot_ema", "EMA ")):
        own = [row for row in rows if row["eval"] == kind]
        for place, number in enumerate(numbers):
            means = [{"step": row["step"], "mean": _mean(row, str(number))} for row in own]
            style = f"shots-{min(place, _SHOT_STYLES - 1)}"
            name = f"{prefix}{number}-shot"
            lines.append(_series(name, style, means, "mean", scale=100, points=True, dashed=kind != "fewshot"))
    return lines


def _mean(row: FewShotRow, shots: str) -> float | None:
    return row["shots"][shots]["mean"] if shots in row["shots"] else None


def _throughput(run: RecordedRun) -> _Section:
    marks = _marks(run)
    speed = _series("images/s", "train", run.train, "images_per_second", noisy=True)
    mfu = _series("MFU", "train", run.train, "mfu", scale=100, noisy=True)
    wait = _series("waiting for data", "eval", run.train, "data_wait", scale=100, noisy=True)
    note = "" if run.environment["peak_flops"] else "MFU is unknown: the peak FLOP/s of the device is not known."
    charts = [
        line_chart("Images per second", "whole job", [speed], from_zero=True, form="{:,.0f}".format, marks=marks),
        line_chart(
            "Use of the hardware",
            "% of peak FLOP/s, % of step time",
            [mfu, wait],
            from_zero=True,
            form=_percent,
            marks=marks,
        ),
    ]
    return _section("Throughput", charts if run.train else [], note)


def _optimisation(run: RecordedRun) -> _Section:
    marks = _marks(run)
    rate = _series("learning rate", "train", run.train, "lr")
    norm = _series("global norm before clipping", "train", run.train, "grad_norm", noisy=True)
    charts = [
        line_chart("Learning rate", "", [rate], from_zero=True, form="{:.3g}".format, marks=marks),
        line_chart("Gradient norm", "", [norm], from_zero=True, form="{:.3g}".format, marks=marks),
    ]
    return _section("Optimisation", charts if run.train else [], "")


def _marks(run: RecordedRun) -> list[Mark]:
    """Rewinds, restarts and, unless there are too many to tell apart, checkpoints."""
    marks = []
    for style, events, tick in (
        ("rewind", run.events_of("rewind"), False),
        ("restart", run.restarts, False),
        ("checkpoint", run.events_of("checkpoint"), True),
    ):
        if tick and len(events) > _TICKS_UP_TO:
            continue
        for event in events:
            if (step := _step_of(event)) is not None:
                marks.append(Mark(step, style, f"{_when(event)}: {event['message']}", tick))
    return marks


def _events(run: RecordedRun) -> _Events | None:
    """What happened besides training: the newest events, and if those are not all, all of them."""
    if not run.events:
        return None
    saved = run.events_of("checkpoint")
    rows = _without_repeats([event for event in run.events if event["event"] != "checkpoint"])
    note = f"{run.describe_incidents() or 'No incident'}; {len(saved):,} checkpoint{'s' * (len(saved) != 1)} saved."
    if len(rows) > _EVENTS_SHOWN:
        note += f" The newest {_EVENTS_SHOWN} of {len(rows):,} rows:"
    some = len(run.events) > min(len(rows), _EVENTS_SHOWN)
    return _Events(note, _event_rows(rows[-_EVENTS_SHOWN:]), _event_rows(run.events) if some else [])


def _without_repeats(events: Sequence[Event]) -> list[Event]:
    """Keeps the last of several events of one kind in a row, which says how many there were."""
    rows = []
    for _, group in groupby(events, key=lambda event: event["event"]):
        *before, last = group
        row = last.copy()
        if before:
            row["message"] += f" (and {len(before):,} such before, from {_when(before[0])} on)"
        rows.append(row)
    return rows


def _event_rows(events: Sequence[Event]) -> list[_EventRow]:
    return [
        _EventRow(
            severity=_severity(event),
            when=_when(event),
            what=event["event"].replace("_", " "),
            step="" if (step := _step_of(event)) is None else f"{step:,}",
            message=event["message"],
            who=_who(event),
        )
        for event in events
    ]


def _severity(event: Event) -> str:
    if event["event"] in ("failure", "hang", "anomaly", "checkpoint_failed"):
        return "bad"
    return "plain" if event["event"] in ("start", "stop", "checkpoint") else "notable"


def _when(event: Event) -> str:
    """In the zone of the one who wrote it, to the second."""
    try:
        return f"{datetime.fromisoformat(event['time']):%Y-%m-%d %H:%M:%S}"
    except ValueError:
        return event["time"]


def _step_of(event: Event) -> int | None:
    """The step at which it happened; for a rewind, the step before it."""
    step = event.get("from_step", event.get("step"))
    return step if isinstance(step, int) else None


def _who(event: Event) -> str:
    name = f"rank {event['rank']}" if "rank" in event else "launcher"
    return f"{name}, {event['host']}" if event.get("host") else name


def _section(title: str, charts: Sequence[str], note: str) -> _Section:
    note = note.strip() if charts else "No step has been logged yet."
    return _Section(title, note, [Markup(chart) for chart in charts])


def _series(
    name: str,
    style: str,
    rows: Sequence[Mapping[str, Any]],
    key: str,
    *,
    scale: float = 1.0,
    noisy: bool = False,
    points: bool = False,
    dashed: bool = False,
) -> Series:
    return Series(name, style, _column(rows, "step"), scale * _column(rows, key), noisy, points, dashed)


def _column(rows: Iterable[Mapping[str, Any]], key: str) -> Array:
    """[N] float64 of one key; NaN for null."""
    return np.array([np.nan if row[key] is None else row[key] for row in rows], dtype=np.float64)


def _median(run: RecordedRun, key: str) -> float:
    values = _column(run.train, key)
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def _short(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{value:.1f} %"
