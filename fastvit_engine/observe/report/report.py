"""One HTML file that shows a run: self-contained, opens from disk, reads well on a phone and on paper."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

import fastvit_engine
from fastvit_engine.files import atomic_write
from fastvit_engine.observe.events import Event
from fastvit_engine.observe.metrics import TrainRow
from fastvit_engine.observe.report.chart import Array, Mark, Series, line_chart
from fastvit_engine.observe.report.recorded_run import RecordedRun, Sample, Samples, best_evaluation, load_run
from fastvit_engine.observe.report.style import STYLE
from fastvit_engine.observe.units import format_bytes, format_duration, format_flops, format_share

_SMALL_IMAGE = 96  # pixels; below it the report shows an image larger than it is, and its pixels as squares
_EVENTS_SHOWN = 25
_TICKS_UP_TO = 100  # checkpoints; more are a bar at the bottom of every chart
_KINDS = (("eval", "held-out", "eval"), ("eval_ema", "held-out, EMA weights", "ema"))  # row kind, name, style class

# The page may show its own images and styles and reach for nothing else.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(run_folder: Path) -> Path:
    """Writes `report.html` into a run folder, of a finished run or one in progress, and returns its path.

    Raises UserError where `run_folder` is not a run folder or a file in it is damaged.
    """
    run = load_run(run_folder)
    atomic_write(run.folder.report, render(run))
    return run.folder.report


def render(run: RecordedRun) -> str:
    """The report as HTML."""
    title = f"{run.describe_model()} · {run.folder.path.resolve().name}"
    sections = [
        _headline(run),
        _learning(run),
        _throughput(run),
        _optimisation(run),
        _events(run),
        _predictions(run.samples),
        _record(run),
    ]
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + f"\n<footer>Written by FastViT Engine {fastvit_engine.__version__} on {escape(written)}.</footer>"
        "\n</main>\n</body>\n</html>\n"
    )


def _headline(run: RecordedRun) -> str:
    environment = run.environment
    if run.finished:
        state = '<span class="state">finished</span>'
    else:
        done = 100 * run.step // environment["total_steps"]
        state = f'<span class="state running">{run.step:,} of {environment["total_steps"]:,} steps ({done} %)</span>'
    return (
        f'<header><p class="over"><span>{escape(run.folder.path.resolve().name)}</span>{state}</p>'
        f'<h1>{escape(run.describe_model())}</h1><p class="lead">{escape(run.describe_training())}.</p>'
        f"{_tiles(run)}{_facts(run)}</header>"
    )


def _tiles(run: RecordedRun) -> str:
    tiles: list[tuple[str, str, str]] = []  # name, figure, remark
    for kind, name in (("eval", "top-1"), ("eval_ema", "top-1, EMA weights")):
        if rows := run.evaluations_of(kind):
            final, best = rows[-1], best_evaluation(rows)
            when = "the best" if best is final else f"best {format_share(best['top1'])} at step {best['step']:,}"
            tiles.append((name, format_share(final["top1"]), f"{final['samples']:,} held-out images; {when}"))
    if rows := run.evaluations_of("eval"):
        tiles.append(("held-out loss", _short(rows[-1]["loss"]), f"at step {rows[-1]['step']:,}"))
    elif run.train:
        tiles.append(("training loss", _short(run.train[-1]["loss"]), f"at step {run.train[-1]['step']:,}"))
    if run.train:
        tiles.append(("throughput", f"{_median(run, 'images_per_second'):,.0f}", "images/s, median"))
        mfu = _median(run, "mfu")
        if np.isfinite(mfu):
            tiles.append(("MFU", format_share(mfu), "of peak FLOP/s, median"))
        if incidents := run.describe_incidents():
            tiles.append(("restarts and rewinds", f"{len(run.restarts) + len(run.events_of('rewind')):,}", incidents))
        tiles.append(("training time", format_duration(run.seconds), f"{run.train[-1]['samples']:,} images"))
    cells = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(figure)}<small>{escape(remark)}</small></dd></div>"
        for name, figure, remark in tiles
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>' if tiles else '<p class="lead">No step has been logged yet.</p>'


def _facts(run: RecordedRun) -> str:
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
        "Compute": f"{format_flops(environment['training_flops_per_image'])} an image, forward and backward",
        "Peak": f"{format_flops(peak)}/s ({environment['peak_flops_source']})" if peak else "unknown: no MFU",
        "Peak memory": format_bytes(max(row["memory_bytes"] for row in run.train)) + " a process"
        if run.train
        else None,
        "Started": f"{started:%Y-%m-%d %H:%M} on {environment['hostname']}",
        "Versions": versions,
    }
    rows = (f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items() if value)
    return f'<dl class="facts">{"".join(rows)}</dl>'


def _seen(row: TrainRow) -> str:
    return f"{row['samples']:,} images" + ("" if row["epoch"] is None else f", {row['epoch']:,.2f} epochs")


def _learning(run: RecordedRun) -> str:
    marks = _marks(run)
    loss = [_series("training", "train", run.train, "loss", noisy=True)]
    accuracy: list[Series] = []
    for kind, name, style in _KINDS:
        rows = run.evaluations_of(kind)
        loss.append(_series(name, style, rows, "loss", points=True))
        short = "EMA " if kind == "eval_ema" else ""
        accuracy.append(_series(f"{short}top-1", style, rows, "top1", scale=100, points=True))
        accuracy.append(_series(f"{short}top-5", style, rows, "top5", scale=100, dashed=True))
    charts = [line_chart("Loss", "cross-entropy, nats an image", loss, form=_short, marks=marks)]
    if run.evaluations:
        charts.append(line_chart("Accuracy", "% of held-out images", accuracy, form="{:.1f} %".format, marks=marks))
    note = "" if run.evaluations else "The run has not been evaluated on held-out images."
    broken = sum(not np.isfinite(row["loss"]) for row in run.train)
    if broken:
        note += f" The training loss is not finite in {broken:,} of {len(run.train):,} logged steps."
    return _section("Learning", charts if run.train or run.evaluations else [], note)


def _throughput(run: RecordedRun) -> str:
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


def _optimisation(run: RecordedRun) -> str:
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


def _events(run: RecordedRun) -> str:
    """A table of what happened besides training; of many events the newest, and all of them where one can unfold it."""
    if not run.events:
        return ""
    saved = run.events_of("checkpoint")
    others = [event for event in run.events if event["event"] != "checkpoint"]
    rows = _without_repeats(others)
    note = f"{run.describe_incidents() or 'No incident'}; {len(saved):,} checkpoint{'s' * (len(saved) != 1)} saved."
    if len(rows) > _EVENTS_SHOWN:
        note += f" The newest {_EVENTS_SHOWN} of {len(rows):,} rows:"
    every = ""
    if len(run.events) > min(len(rows), _EVENTS_SHOWN):
        summary = f"All {len(run.events):,} events, checkpoints included"
        every = f"<details><summary>{summary}</summary>{_event_table(run.events)}</details>"
    return (
        f'<section><h2>Events</h2><p class="note">{escape(note)}</p>'
        f"{_event_table(rows[-_EVENTS_SHOWN:])}{every}</section>"
    )


def _without_repeats(events: Sequence[Event]) -> list[Event]:
    """Of several events of a kind in a row, the last, which says how many there were."""
    rows = []
    for _, group in groupby(events, key=lambda event: event["event"]):
        *before, last = group
        row = last.copy()
        if before:
            row["message"] += f" (and {len(before):,} such before, from {_when(before[0])} on)"
        rows.append(row)
    return rows


def _event_table(events: Sequence[Event]) -> str:
    rows = "".join(
        f'<tr class="{_severity(event)}"><td class="when">{escape(_when(event))}</td>'
        f'<td class="what">{escape(event["event"].replace("_", " "))}</td>'
        f'<td class="step">{"" if (step := _step_of(event)) is None else f"{step:,}"}</td>'
        f'<td class="message">{escape(event["message"])}</td><td class="who">{escape(_who(event))}</td></tr>'
        for event in events
    )
    head = "<thead><tr><th>time</th><th>event</th><th>step</th><th>what happened</th><th>said by</th></tr></thead>"
    return f'<table class="events">{head}<tbody>{rows}</tbody></table>' if rows else ""


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
    """Where training stood; for a rewind, before it."""
    step = event.get("from_step", event.get("step"))
    return step if isinstance(step, int) else None


def _who(event: Event) -> str:
    name = f"rank {event['rank']}" if "rank" in event else "launcher"
    return f"{name}, {event['host']}" if event.get("host") else name


def _section(title: str, charts: Sequence[str], note: str) -> str:
    note = note.strip() if charts else "No step has been logged yet."
    body = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    return f"<section><h2>{title}</h2>" + (f'<p class="note">{escape(note)}</p>' if note else "") + f"{body}</section>"


def _predictions(samples: Samples | None) -> str:
    head = "<section><h2>Sample predictions</h2>"
    if samples is None or not samples.samples:
        return f'{head}<p class="note">The run has left no sample predictions.</p></section>'
    right = sum(sample.correct for sample in samples.samples)
    cards = "".join(_card(sample, samples.class_name) for sample in samples.samples)
    return (
        f'{head}<p class="note">{right} of {len(samples.samples)} held-out images right at step {samples.step:,}; '
        f'the bars are the five most probable classes.</p><ul class="samples">{cards}</ul></section>'
    )


def _card(sample: Sample, class_name: Callable[[int], str]) -> str:
    truth = escape(class_name(sample.label))
    guess = escape(class_name(sample.predictions[0][0])) if sample.predictions else "no prediction"
    small = ' class="small"' if sample.width < _SMALL_IMAGE else ""
    bars = "".join(
        f"<li{' class=' + chr(34) + 'true' + chr(34) if index == sample.label else ''}>"
        f'<span class="name">{escape(class_name(index))}</span>'
        f'<span class="bar"><i style="width:{100 * min(1.0, max(0.0, probability)):.1f}%"></i></span>'
        f'<span class="share">{format_share(probability)}</span></li>'
        for index, probability in sample.predictions
    )
    return (
        f'<li class="sample{"" if sample.correct else " wrong"}">'
        f'<img{small} src="{escape(sample.image)}" alt="{truth}" title="{escape(sample.key)}">'
        f'<div><p class="verdict">{"✓" if sample.correct else "✗"} {guess}</p><p class="truth">true: {truth}</p></div>'
        f'<ul class="guesses">{bars}</ul></li>'
    )


def _record(run: RecordedRun) -> str:
    config = run.config if run.config is not None else "The run folder has no config.yaml."
    environment = json.dumps(run.environment, indent=2, ensure_ascii=False)
    return (
        "<section><h2>Record</h2>"
        f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>"
        f"<details><summary>Environment</summary><pre>{escape(environment)}</pre></details></section>"
    )


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
