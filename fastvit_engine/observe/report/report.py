"""One HTML file that shows a run: self-contained, opens from disk, reads well on a phone and on paper."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from fastvit_engine.files import atomic_write
from fastvit_engine.observe.metrics import FewShotRow, OwnRow, TrainRow
from fastvit_engine.observe.report.axes import Axes, Axis
from fastvit_engine.observe.report.chart import PERCENT, SHORT, WHOLE, Mark, Series, line_chart
from fastvit_engine.observe.report.incidents import EventRow, continuations, event_rows, tracks, without_repeats
from fastvit_engine.observe.report.page import Cell, Section, Table, render_page, section
from fastvit_engine.observe.report.quantities import few_shot_numbers, few_shot_series, median, series
from fastvit_engine.observe.report.recorded_run import RecordedRun, best_evaluation
from fastvit_engine.observe.report.step_time import PARTS, mean_step
from fastvit_engine.observe.report.timeline import timeline
from fastvit_engine.observe.units import counted, format_bytes, format_duration, format_flops, format_share

_SMALL_IMAGE = 96  # pixels; below it the report shows an image larger than it is, and its pixels as squares
_EVENTS_SHOWN = 25
_SHOT_STYLES = 4  # colours of few-shot lines, in the style sheet
_TICKS_UP_TO = 100  # checkpoints; more are a bar at the bottom of every chart
_CLASSES_SHOWN = 30  # of many classes, the weakest
_MISTAKES_SHOWN = 15
_UNITS = {  # of the loss, by objective
    "classify": "cross-entropy, nats per image",
    "mae": "squared error of hidden pixels, normalised per patch",
    "masked_patch": "error of the predictions of corrupted patches",
    "moco": "cross-entropy of the image among those of its step, times twice the temperature",
}
KINDS = (("eval", "held-out", "eval"), ("eval_ema", "held-out, EMA weights", "ema"))  # row kind, name, style class


class _Tile(NamedTuple):
    name: str
    figure: str
    remark: str


class _Events(NamedTuple):
    note: str
    newest: list[EventRow]
    all: list[EventRow]  # empty if the newest are all


def write_report(run: RecordedRun) -> Path:
    """Writes `report.html` into the folder of a run, finished or in progress, and returns its path."""
    atomic_write(run.folder.report, render(run))
    return run.folder.report


def render(run: RecordedRun, axis: Axis = "steps") -> str:
    """The report as HTML. axis: of the charts, until the reader chooses another one."""
    environment, done = run.environment, 100 * run.step // run.environment["total_steps"]
    axes = Axes([run.progress()], [run.step], axis)
    marks = _marks(run)
    return render_page(
        "report.html.jinja",
        axes,
        name=run.folder.name,
        model=run.describe_model(),
        training=run.describe_training(),
        run=run,
        progress="" if run.finished else f"{run.step:,} of {environment['total_steps']:,} steps ({done} %)",
        tiles=_tiles(run),
        facts=_facts(run),
        sections=[_learning(run, axes, marks), _throughput(run, axes, marks), _optimisation(run, axes, marks)],
        few_shot=_few_shot_table(run.few_shot),
        step_time=mean_step(run.train),
        profiles=run.profiles,
        classes=run.classes,
        classes_shown=_CLASSES_SHOWN,
        mistakes_shown=_MISTAKES_SHOWN,
        events=_events(run),
        timeline=_timeline(run, axes),
        samples=run.samples,
        reconstructions=run.reconstructions,
        inspected=run.inspected,
        labelled=not run.losses,
        small_image=_SMALL_IMAGE,
        config=run.config if run.config is not None else "The run folder has no config.yaml.",
        environment=json.dumps(environment, indent=2, ensure_ascii=False),
    )


def _tiles(run: RecordedRun) -> list[_Tile]:
    tiles: list[_Tile] = []
    for kind, name in (("eval", "top-1"), ("eval_ema", "top-1, EMA weights")):
        if rows := run.evaluations_of(kind):
            final, best = rows[-1], best_evaluation(rows)
            remark = f"{final['samples']:,} held-out images"
            if best is not final:
                remark += f"; best {format_share(best['top1'])} at step {best['step']:,}"
            elif len(rows) > 1:
                remark += "; the best of the run"
            tiles.append(_Tile(name, format_share(final["top1"]), remark))
    if losses := run.losses_of("eval"):
        tiles.append(_Tile("held-out loss", SHORT(losses[-1]["loss"]), f"at step {losses[-1]['step']:,}"))
    elif run.train:
        tiles.append(_Tile("training loss", SHORT(run.train[-1]["loss"]), f"at step {run.train[-1]['step']:,}"))
    if run.train:
        speed, mfu = median(run.train, "images_per_second"), median(run.train, "mfu")
        if speed is not None:
            tiles.append(_Tile("throughput", WHOLE(speed), "images/s, median"))
        if mfu is not None:
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
        "Processes": f"{run.describe_processes()}, DeepSpeed ZeRO stage {environment['zero_stage']}",
        "Compute": f"{format_flops(environment['training_flops_per_image'])} per image, forward and backward",
        "Peak": f"{format_flops(peak)}/s ({environment['peak_flops_source']})" if peak else "unknown: no MFU",
        "Peak memory": format_bytes(max(row["memory_bytes"] for row in run.train)) + " per process"
        if run.train
        else None,
        "Data order": f"hash {run.train[-1]['samples_hash']} of step {run.train[-1]['step']:,}" if run.train else None,
        "Started": f"{started:%Y-%m-%d %H:%M} on {environment['hostname']}",
        "Versions": versions,
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _seen(row: TrainRow) -> str:
    return f"{row['samples']:,} images" + ("" if row["epoch"] is None else f", {row['epoch']:,.2f} epochs")


def _learning(run: RecordedRun, axes: Axes, marks: Sequence[Mark]) -> Section:
    loss = [series("training", "train", run.train, "loss", noisy=True)]
    accuracy: list[Series] = []
    for kind, name, style in KINDS:
        rows = run.evaluations_of(kind)
        loss.append(series(name, style, run.losses_of(kind), "loss", points=True))
        short = "EMA " if kind == "eval_ema" else ""
        accuracy.append(series(f"{short}top-1", style, rows, "top1", scale=100, points=True))
        accuracy.append(series(f"{short}top-5", style, rows, "top5", scale=100, dash=1))
    unit = _UNITS.get(run.environment.get("objective", "classify"), "")
    charts = [line_chart("Loss", unit, loss, axes, marks=marks)]
    if run.evaluations:
        charts.append(line_chart("Accuracy", "% of held-out images", accuracy, axes, form=PERCENT, marks=marks))
    if run.few_shot:
        lines = _few_shot(run.few_shot)
        unit = "% of images, by a linear classifier on the features"
        charts.append(line_chart("Few-shot accuracy", unit, lines, axes, form=PERCENT, marks=marks))
    charts += _own_charts(run.own, axes, marks)
    note = "" if run.evaluations or run.losses else "The run has not been evaluated on held-out images."
    broken = sum(not np.isfinite(row["loss"]) for row in run.train)
    if broken:
        note += f" The training loss is not finite in {broken:,} of {len(run.train):,} logged steps."
    recorded = any((run.train, run.evaluations, run.few_shot, run.own, run.losses))
    return section("Learning", charts if recorded else [], note)


def _own_charts(rows: Sequence[OwnRow], axes: Axes, marks: Sequence[Mark]) -> list[str]:
    """A chart for each evaluator of one's own, with a line per figure; dashed for the average of the weights."""
    charts = []
    for name in dict.fromkeys(row["eval"].removesuffix("_ema") for row in rows):
        lines = []
        for kind, prefix, dash in ((name, "", 0), (f"{name}_ema", "EMA ", 1)):
            found = [{"step": row["step"], **row["figures"]} for row in rows if row["eval"] == kind]
            for number, figure in enumerate(dict.fromkeys(key for row in found for key in row if key != "step")):
                style = f"shots-{number % _SHOT_STYLES}"
                lines.append(series(f"{prefix}{figure}", style, found, figure, dash=dash, points=True))
        charts.append(line_chart(name, "", lines, axes, marks=marks))
    return charts


def _few_shot(rows: Sequence[FewShotRow]) -> list[Series]:
    """A line per number of shots, for the weights and, dashed, for their average."""
    lines = []
    for kind, prefix, dash in (("fewshot", "", 0), ("fewshot_ema", "EMA ", 1)):
        for place, number in enumerate(few_shot_numbers(rows)):
            style = f"shots-{min(place, _SHOT_STYLES - 1)}"
            lines.append(few_shot_series(rows, kind, number, f"{prefix}{number}-shot", style, dash=dash))
    return lines


def _few_shot_table(rows: Sequence[FewShotRow]) -> Table | None:
    """The last figures of the weights and of their average."""
    numbers = few_shot_numbers(rows)
    table = []
    for kind, name in (("fewshot", "weights"), ("fewshot_ema", "EMA weights")):
        if own := [row for row in rows if row["eval"] == kind]:
            last = own[-1]
            found = (last["shots"].get(str(number)) for number in numbers)
            shares = ["" if one is None else f"{format_share(one['mean'])} ± {100 * one['std']:.1f}" for one in found]
            about = [f"{last['step']:,}", counted(last["samples"], "image")]
            table.append([Cell(text) for text in (name, *shares, *about)])
    note = "Mean and standard deviation over the seeds, in % of the images."
    columns = ["", *(f"{number}-shot" for number in numbers), "step", "evaluated on"]
    return Table("Few-shot accuracy at the last evaluation", columns, table, note) if table else None


def _throughput(run: RecordedRun, axes: Axes, marks: Sequence[Mark]) -> Section:
    speed = series("images/s", "train", run.train, "images_per_second", noisy=True)
    mfu = series("MFU", "train", run.train, "mfu", scale=100, noisy=True)
    wait = series("waiting for data", "eval", run.train, "data_wait", scale=100, noisy=True)
    memory = series("peak of the largest process", "train", run.train, "memory_bytes", scale=2.0**-30)
    parts = [series(name, style, run.train, key, scale=100, noisy=True) for key, name, style in PARTS]
    note = "" if run.environment["peak_flops"] else "MFU is unknown: the peak FLOP/s of the device is not known."
    charts = [
        line_chart("Images per second", "whole job", [speed], axes, from_zero=True, form=WHOLE, marks=marks),
        line_chart(
            "Use of the hardware",
            "% of peak FLOP/s, % of step time",
            [mfu, wait],
            axes,
            from_zero=True,
            form=PERCENT,
            marks=marks,
        ),
        line_chart("Memory", "GiB", [memory], axes, from_zero=True, marks=marks),
    ]
    if any("forward" in row for row in run.train):
        charts.append(line_chart("Parts of a step", "% of step time", parts, axes, from_zero=True, form=PERCENT))
    return section("Throughput", charts if run.train else [], note)


def _optimisation(run: RecordedRun, axes: Axes, marks: Sequence[Mark]) -> Section:
    rate = series("learning rate", "train", run.train, "lr")
    norm = series("global norm before clipping", "train", run.train, "grad_norm", noisy=True)
    charts = [
        line_chart("Learning rate", "", [rate], axes, from_zero=True, marks=marks),
        line_chart("Gradient norm", "", [norm], axes, from_zero=True, marks=marks),
    ]
    return section("Optimisation", charts if run.train else [])


def _marks(run: RecordedRun) -> list[Mark]:
    """Rewinds, restarts and, unless there are too many to tell apart, checkpoints."""
    marks = []
    for track in tracks(run.events, run.train):
        tick = track.style == "checkpoint"
        if track.style in ("rewind", "restart") or (tick and len(track.moments) <= _TICKS_UP_TO):
            marks += [Mark(moment.step, track.style, moment.text, tick) for moment in track.moments]
    return marks


def _timeline(run: RecordedRun, axes: Axes) -> Markup | None:
    """None if nothing but checkpoints has happened."""
    found = tracks(run.events, run.train)
    return Markup(timeline(found, axes)) if any(track.style != "checkpoint" for track in found) else None


def _events(run: RecordedRun) -> _Events | None:
    """What happened besides training: the newest events, and if those are not all, all of them."""
    if not run.events:
        return None
    saved = run.events_of("checkpoint")
    rows = without_repeats([event for event in run.events if event["event"] != "checkpoint"])
    note = f"{run.describe_incidents() or 'No incident'}; {counted(len(saved), 'checkpoint')} saved"
    planned = len(continuations(run.events))
    note += f"; started again as planned {counted(planned, 'time')}." if planned else "."
    if len(rows) > _EVENTS_SHOWN:
        note += f" The newest {_EVENTS_SHOWN} of {len(rows):,} rows:"
    some = len(run.events) > min(len(rows), _EVENTS_SHOWN)
    return _Events(note, event_rows(rows[-_EVENTS_SHOWN:]), event_rows(run.events) if some else [])
