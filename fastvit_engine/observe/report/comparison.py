"""One HTML file that compares several runs: in what they differ, how they ended, and their curves over each other."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from fastvit_engine.errors import UserError
from fastvit_engine.observe.metrics import FewShotRow
from fastvit_engine.observe.report.axes import Axes, Axis, flops_of
from fastvit_engine.observe.report.chart import PERCENT, SHORT, WHOLE, Form, line_chart
from fastvit_engine.observe.report.page import Cell, Section, Table, render_page, section
from fastvit_engine.observe.report.quantities import few_shot_numbers, few_shot_series, median, series
from fastvit_engine.observe.report.recorded_run import RecordedRun, best_evaluation
from fastvit_engine.observe.report.settings import Difference, machine_differences, setting_differences
from fastvit_engine.observe.units import (
    counted,
    format_bytes,
    format_count,
    format_duration,
    format_flops,
    format_share,
)

MOST_RUNS = 40  # of eight colours and five patterns of lines
_COLOURS, _DASHES = 8, 5  # in the style sheet
# What a loss depends on; of a self-supervised one, also on keys of its own section.
_OBJECTIVE = ("train.objective", "loss.kind", "loss.label_smoothing", "model.num_classes")
_PRETRAINING = ("mae.mask_ratio", "masked_patch.ratio", "masked_patch.target")
_EVALUATION = ("data.eval",)
_FEW_SHOT = ("evaluate.fewshot.train", "evaluate.fewshot.eval")

Settings = Mapping[str, str]


class _Column(NamedTuple):
    """A figure of each run, and which of them is best."""

    name: str
    values: list[float | None]
    form: Callable[[float], str]
    best: Callable[[Sequence[float]], float] | None = None  # None: none is better than another


class _Named(NamedTuple):
    """A run as the page shows it."""

    name: str
    style: str  # classes in the style sheet
    dash: int
    number: int
    run: RecordedRun


def name_runs(paths: Sequence[str]) -> list[str]:
    """The name of each run: its folder, with as many of those above as tell it from the others.

    Raises UserError if a run is given twice, or if there are too many.
    """
    if len(paths) > MOST_RUNS:
        raise UserError(f"{len(paths)} runs are too many to tell apart: compare at most {MOST_RUNS}")
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise UserError(f"{path} is given twice: name each run once")
    parts = [PurePath(path).parts for path in paths]
    names = []
    for own in parts:
        length = 1
        while sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(part.strip("/") for part in own[-length:]).strip("/") or "/")
    return names


def render_comparison(
    runs: Sequence[RecordedRun], names: Sequence[str], settings: Sequence[Settings | None], axis: Axis = "steps"
) -> str:
    """The page as HTML. settings: of each run, as `flat_settings` has them; None if they are unknown."""
    named = [
        _Named(name, f"run-{number % _COLOURS}", number % _DASHES, number, run)
        for number, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    axes = Axes([run.progress() for run in runs], [run.step for run in runs], axis)
    return render_page(
        "comparison.html.jinja",
        axes,
        runs=named,
        tables=[table for table in (_results(named, settings), _few_shot(named, settings), _speed(named)) if table],
        differences=_differences(named, settings),
        order=_data_order(runs),
        sections=[_learning(named, axes, settings), _throughput(named, axes), _optimisation(named, axes)],
    )


def _results(named: Sequence[_Named], settings: Sequence[Settings | None]) -> Table:
    """Accuracy and loss of each run."""
    finals = {kind: [run.run.evaluations_of(kind) for run in named] for kind in ("eval", "eval_ema")}
    why = _listed(_of_loss(settings), settings)
    same_loss, note = not why, f"Losses are not compared: {why}. " if why else ""
    images = {evaluated[-1]["samples"] for run in named if (evaluated := run.run.losses_of("eval"))}
    same_images = len(images) <= 1 and not _differ(_EVALUATION, settings)
    if not same_images:
        why = _listed(_EVALUATION, settings) or "the numbers of images differ"
        note += f"The runs were evaluated on different images, so none is marked as best: {why}."
    highest, lowest = (max if same_images else None), (min if same_images and same_loss else None)

    columns = []
    for kind, prefix in (("eval", ""), ("eval_ema", "EMA ")):
        rows = finals[kind]
        if any(rows):
            top1 = [row[-1]["top1"] if row else None for row in rows]
            columns.append(_Column(f"{prefix}top-1", top1, format_share, highest))
            top5 = [row[-1]["top5"] if row else None for row in rows]
            columns.append(_Column(f"{prefix}top-5", top5, format_share, highest))
            best = [best_evaluation(row)["top1"] if row else None for row in rows]
            columns.append(_Column(f"{prefix}best top-1", best, format_share, highest))
        losses = [run.run.losses_of(kind) for run in named]
        if any(losses):
            loss = [row[-1]["loss"] if row else None for row in losses]
            columns.append(_Column(f"{prefix}held-out loss", loss, SHORT, lowest))
    training = [run.run.train[-1]["loss"] if run.run.train else None for run in named]
    columns.append(_Column("training loss", training, SHORT, min if same_loss else None))
    return _table("Results", named, columns, f"{note} {_left_out(named)}".strip(), finished_only=True)


def _left_out(named: Sequence[_Named]) -> str:
    """A sentence on the runs whose results would be compared with those of longer training; empty if there are none."""
    unfinished = [run.name for run in named if not run.run.finished]
    return f"Not finished, so not marked as best: {', '.join(unfinished)}." if unfinished else ""


def _few_shot(named: Sequence[_Named], settings: Sequence[Settings | None]) -> Table | None:
    """The last few-shot accuracy of each run."""
    rows = [row for run in named for row in run.run.few_shot]
    best = None if _differ(_FEW_SHOT, settings) else max
    columns = []
    for kind, prefix in (("fewshot", ""), ("fewshot_ema", "EMA ")):
        for shots in few_shot_numbers(row for row in rows if row["eval"] == kind):
            means = [_last_mean(run.run.few_shot, kind, shots) for run in named]
            columns.append(_Column(f"{prefix}{shots}-shot", means, format_share, best))
    note = "" if best else f"The shards differ, so none is marked as best: {_listed(_FEW_SHOT, settings)}."
    if not columns:
        return None
    return _table("Few-shot accuracy", named, columns, f"{note} {_left_out(named)}".strip(), finished_only=True)


def _last_mean(rows: Sequence[FewShotRow], kind: str, shots: int) -> float | None:
    own = [row for row in rows if row["eval"] == kind and str(shots) in row["shots"]]
    return own[-1]["shots"][str(shots)]["mean"] if own else None


def _speed(named: Sequence[_Named]) -> Table:
    """Speed, and what it cost."""
    trained = [run.run.train for run in named]
    flops = [
        flops_of(rows[-1], run.run.environment["training_flops_per_image"]) if rows else None
        for rows, run in zip(trained, named, strict=True)
    ]
    columns = [
        _Column("images/s", [median(rows, "images_per_second") for rows in trained], WHOLE, max),
        _Column("MFU", [median(rows, "mfu") for rows in trained], format_share, max),
        _Column("data wait", [median(rows, "data_wait") for rows in trained], format_share, min),
        _Column("memory", [max((row["memory_bytes"] for row in rows), default=None) for rows in trained], format_bytes),
        _Column("time", [rows[-1]["seconds"] if rows else None for rows in trained], format_duration),
        _Column("images", [rows[-1]["samples"] if rows else None for rows in trained], format_count),
        _Column("compute", flops, format_flops),
    ]
    table = _table("Speed and cost", named, columns, "Medians over the logged steps; memory of the largest process.")
    for row, run in zip(table.rows, named, strict=True):
        row.append(Cell(run.run.describe_incidents() or "none"))
    return table._replace(columns=[*table.columns, "incidents"])


def _table(
    title: str, named: Sequence[_Named], columns: Sequence[_Column], note: str, *, finished_only: bool = False
) -> Table:
    """A row per run; columns without any value are left out. finished_only: only finished runs can be the best."""
    kept = [column for column in columns if any(value is not None for value in column.values)]
    rows = [[Cell(run.name, style=_classes(run))] for run in named]
    for column in kept:
        ranked = [run.run.finished or not finished_only for run in named]
        best = _best(column, ranked)
        for row, value, counts in zip(rows, column.values, ranked, strict=True):
            row.append(Cell("–") if value is None else Cell(column.form(value), counts and value == best))
    return Table(title, ["run", *(column.name for column in kept)], rows, note)


def _best(column: _Column, ranked: Sequence[bool]) -> float | None:
    """The best value of the runs that are ranked; None if there is none, or if all are alike."""
    values = [value for value, counts in zip(column.values, ranked, strict=True) if counts]
    known = [value for value in values if value is not None and np.isfinite(value)]
    if column.best is None or len(set(known)) < 2:
        return None
    return column.best(known)


def _differences(named: Sequence[_Named], settings: Sequence[Settings | None]) -> list[Table]:
    """In what the runs differ: settings, then machine and software."""
    unknown = [run.name for run, own in zip(named, settings, strict=True) if own is None]
    note = f"Unknown, as config.yaml is missing or damaged: {', '.join(unknown)}." if unknown else ""
    found = setting_differences(settings)
    if not found and not note:
        note = "All settings are the same."
    machine = machine_differences([run.run.environment for run in named])
    return [
        _of_differences("Settings", named, found, note),
        _of_differences("Model, machine and software", named, machine, "" if machine else "All are the same."),
    ]


def _of_differences(title: str, named: Sequence[_Named], differences: Sequence[Difference], note: str) -> Table:
    rows = [[Cell(row.key), *(Cell("–" if value is None else value) for value in row.values)] for row in differences]
    return Table(title, ["", *(run.name for run in named)], rows, note)


def _data_order(runs: Sequence[RecordedRun]) -> str:
    """Whether the runs read the same samples in the same steps, as far as their logged steps say."""
    hashes = [{row["step"]: row["samples_hash"] for row in run.train} for run in runs]
    common = sorted(set.intersection(*(set(own) for own in hashes)))
    if not common:
        return "Data order: the runs have no logged step in common."
    same = sum(len({own[step] for own in hashes}) == 1 for step in common)
    if same == len(common):
        return f"Data order: the same samples in all {counted(same, 'logged step')} that the runs have in common."
    first = next(step for step in common if len({own[step] for own in hashes}) > 1)
    return (
        f"Data order: the same samples in {same:,} of {len(common):,} logged steps that the runs have in common; "
        f"step {first:,} is the first that differs."
    )


def _learning(named: Sequence[_Named], axes: Axes, settings: Sequence[Settings | None]) -> Section:
    labelled = all(run.run.environment.get("objective", "classify") == "classify" for run in named)
    nats = "nats per image" if labelled else ""
    charts = [_chart("Training loss", nats, named, axes, "loss", noisy=True)]
    for kind, of_weights in (("eval", ""), ("eval_ema", " of the EMA weights")):
        if any(losses := [run.run.losses_of(kind) for run in named]):
            title = f"Held-out loss{of_weights}"
            charts.append(_chart(title, nats, named, axes, "loss", rows=losses, points=True))
        if any(rows := [run.run.evaluations_of(kind) for run in named]):
            title, unit = f"Top-1{of_weights}", "% of held-out images"
            charts.append(_chart(title, unit, named, axes, "top1", rows=rows, points=True, scale=100, form=PERCENT))
    for shots in few_shot_numbers(row for run in named for row in run.run.few_shot):
        lines = [
            few_shot_series(run.run.few_shot, "fewshot", shots, run.name, run.style, dash=run.dash, run=run.number)
            for run in named
        ]
        charts.append(line_chart(f"{shots}-shot accuracy", "% of images", lines, axes, form=PERCENT))
    why = _listed(_of_loss(settings), settings)
    note = f"Losses mean different things: {why}." if why else ""
    return section("Learning", charts, note)


def _throughput(named: Sequence[_Named], axes: Axes) -> Section:
    charts = [
        _chart("Images per second", "", named, axes, "images_per_second", noisy=True, from_zero=True, form=WHOLE),
        _chart("MFU", "% of peak FLOP/s", named, axes, "mfu", noisy=True, scale=100, from_zero=True, form=PERCENT),
        _chart("Waiting for data", "% of step time", named, axes, "data_wait", noisy=True, scale=100, from_zero=True,
               form=PERCENT),
        _chart("Memory", "GiB, the largest process", named, axes, "memory_bytes", scale=2.0**-30, from_zero=True),
    ]  # fmt: skip
    return section("Throughput", charts)


def _optimisation(named: Sequence[_Named], axes: Axes) -> Section:
    charts = [
        _chart("Learning rate", "", named, axes, "lr", from_zero=True),
        _chart("Gradient norm", "before clipping", named, axes, "grad_norm", noisy=True, from_zero=True),
    ]
    return section("Optimisation", charts)


def _chart(
    title: str,
    unit: str,
    named: Sequence[_Named],
    axes: Axes,
    key: str,
    *,
    rows: Sequence[Sequence[Any]] | None = None,
    from_zero: bool = False,
    form: Form = SHORT,
    **options: Any,
) -> str:
    """A line per run. rows: of each run, by default those of training. options: as `series` has them."""
    lines = [
        series(run.name, run.style, run.run.train if rows is None else rows[run.number], key,
               dash=run.dash, run=run.number, **options)
        for run in named
    ]  # fmt: skip
    return line_chart(title, unit, lines, axes, from_zero=from_zero, form=form)


def _classes(run: _Named) -> str:
    return f"{run.style} dash-{run.dash}" if run.dash else run.style


def _of_loss(settings: Sequence[Settings | None]) -> list[str]:
    """The keys that decide what the losses of these runs mean."""
    objectives = {own.get("train.objective") for own in settings if own is not None}
    return [*_OBJECTIVE, *(key for key in _PRETRAINING if key.partition(".")[0] in objectives)]


def _differ(keys: Sequence[str], settings: Sequence[Settings | None]) -> bool:
    return any(len({own.get(key) for own in settings if own is not None}) > 1 for key in keys)


def _listed(keys: Sequence[str], settings: Sequence[Settings | None]) -> str:
    """Those of the keys in which the runs differ, as a clause; empty if there are none."""
    found = [key for key in keys if _differ([key], settings)]
    return f"{' and '.join(found)} differ{'s' if len(found) == 1 else ''}" if found else ""
