"""The picture of a study: accuracy over what its runs differ in, with the spread over seeds. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvit_engine.evaluate.themes import Theme, canvas, save, title_of
from fastvit_engine.study.definition import LABEL, short, value_text
from fastvit_engine.study.results import EXAFLOPS, Results, Row

_MARKERS = "osD^vPX*"
_FEW = 8  # values of a setting, each with its tick


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes NAME.png, NAME.svg and the same for dark pages; nothing if no run is finished."""
    rows = [row for row in results.rows() if row.figures]
    if not rows:
        return []
    return save(results.study.name, lambda theme: _figure(results, rows, theme), folder)


def _figure(results: Results, rows: Sequence[Row], theme: Theme) -> Any:
    panels = results.figures
    figure = canvas((1.2 + 4.6 * len(panels), 4.3))
    seeds = {len(spread.values) for row in rows for spread in row.figures.values()}
    counts = "-".join(str(count) for count in sorted({min(seeds), max(seeds)}))
    about = "one seed" if seeds == {1} else f"mean ± standard deviation of {counts} seeds"
    title_of(figure, results.study.title or results.study.name, about, theme)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, name in zip(axes, panels, strict=True):
        _panel(axis, name, results, rows, theme)
    if results.study.figure.lines is not None:
        axes[0].legend(frameon=False, fontsize=8, labelcolor=theme.ink)
    return figure


def _lines(key: str | None, rows: Sequence[Row]) -> dict[Any, list[Row]]:
    """The rows of each line. A row that has no value for `key` is where all lines meet."""
    if key is None:
        return {None: list(rows)}
    shared = [row for row in rows if row.value(key) is None]
    lines: dict[Any, list[Row]] = {row.value(key): [] for row in rows if row not in shared}
    for row in rows:
        if row not in shared:
            lines[row.value(key)].append(row)
    return {line: [*own, *shared] for line, own in lines.items()} or {None: shared}


def _panel(axis: Any, name: str, results: Results, rows: Sequence[Row], theme: Theme) -> None:
    """One accuracy, in percent."""
    from matplotlib.ticker import LogFormatter

    of = results.study.figure
    shown = [row for row in rows if name in row.figures]
    unit, size = results.unit

    def place_of(row: Row) -> Any:
        return row.exaflops * size if of.x == EXAFLOPS else row.value(of.x)

    names = list(dict.fromkeys(place_of(row) for row in shown))
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in names)
    if numeric:
        names = sorted(names)
    lines = _lines(of.lines, shown)
    for number, (line, own) in enumerate(lines.items()):
        own = sorted(own, key=place_of) if numeric else own
        colour = theme.series[number % len(theme.series)]
        shift = 0.0 if numeric else 0.12 * (number - (len(lines) - 1) / 2)
        at = [place_of(row) if numeric else names.index(place_of(row)) + shift for row in own]
        spreads = [row.figures[name] for row in own]
        repeated = any(len(spread.values) > 1 for spread in spreads)
        axis.errorbar(
            at,
            [100 * spread.mean for spread in spreads],
            yerr=[100 * spread.std for spread in spreads] if repeated else None,
            color=colour,
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            linewidth=1.5,
            linestyle="-" if numeric and len(own) > 1 else "none",
            capsize=3,
            label=f"{short(of.lines)} {value_text(line)}" if of.lines not in (None, LABEL) else str(line),
        )
        for place, spread in zip(at, spreads, strict=True):  # every seed
            if len(spread.values) > 1:
                axis.plot(
                    [place] * len(spread.values),
                    [100 * value for value in spread.values],
                    linestyle="none",
                    marker=".",
                    markersize=4,
                    color=colour,
                    alpha=0.4,
                )
    if numeric and (of.log or of.x == EXAFLOPS) and min(names) > 0:
        axis.set_xscale("log")
        if of.x != EXAFLOPS and len(names) <= _FEW:
            axis.set_xticks(names, [value_text(value) for value in names])
            axis.set_xticks([], minor=True)
        else:
            axis.xaxis.set_major_formatter(LogFormatter())
            axis.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    if not numeric:
        axis.set_xticks(range(len(names)), [value_text(value) for value in names], rotation=20, ha="right")
        axis.set_xlim(-0.5, len(names) - 0.5)
    axis.set_xlabel({EXAFLOPS: f"{unit} of the training", LABEL: ""}.get(of.x, of.x))
    few_shot = f"{name.removeprefix('fewshot')}-shot accuracy (%)"
    axis.set_ylabel("top-1 (%)" if name == "top1" else few_shot)
    axis.grid(axis="y", color=theme.line, linewidth=0.7)
    axis.set_axisbelow(True)
