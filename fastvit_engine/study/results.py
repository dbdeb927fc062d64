"""The results of a study: study.json, and a table in Markdown."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from fastvit_engine.files import atomic_write
from fastvit_engine.observe.units import counted
from fastvit_engine.shown import shown
from fastvit_engine.study.definition import LABEL, Study, short, value_text
from fastvit_engine.study.planning import PlannedRun
from fastvit_engine.study.records import FAILED, FINISHED

EXAFLOPS = "exaflops"
_UNITS = (("exaFLOP", 1.0), ("petaFLOP", 1e3), ("teraFLOP", 1e6), ("gigaFLOP", 1e9))
_KEPT = ("settings", "exaflops", "top1", "top1_ema", "loss", "samples", "steps", "images", "seconds", "failed")


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: mean and standard deviation, of the population."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def std(self) -> float:
        return pstdev(self.values)


@dataclass(frozen=True)
class Row:
    """The runs of a study that differ in their seed only."""

    label: str | None
    recipe: str
    settings: dict[str, Any]  # without the seed
    shown: tuple[str, ...]  # keys of those that the table has
    exaflops: float
    figures: dict[str, Spread]  # by name, of the finished runs; without those that no run has
    planned: int
    failed: int

    def value(self, key: str) -> Any:
        """Of a setting, of the label, or the exaFLOPs."""
        if key == EXAFLOPS:
            return self.exaflops
        return self.label if key == LABEL else self.settings.get(key)


@dataclass(frozen=True)
class Results:
    """What is known of a study by now."""

    study: Study
    runs: Sequence[PlannedRun]
    records: Mapping[str, Mapping[str, Any]]  # by the names of the runs

    @property
    def few_shot(self) -> str | None:
        """The name of the few-shot accuracy."""
        return None if self.study.shots is None else f"fewshot{self.study.shots}"

    @property
    def figures(self) -> list[str]:
        """The accuracies that some run has."""
        wanted = ["top1", *([self.few_shot] if self.few_shot else [])]
        finished = [record for record in self.records.values() if record["state"] == FINISHED]
        return [name for name in wanted if any(name in record for record in finished)]

    @property
    def unit(self) -> tuple[str, float]:
        """A unit for the operations of a run, and how many of it an exaFLOP has."""
        largest = max(run.exaflops for run in self.runs)
        return next((unit for unit in _UNITS if largest * unit[1] >= 1), _UNITS[-1])

    def rows(self) -> list[Row]:
        rows: dict[str, list[PlannedRun]] = {}
        for run in self.runs:
            rows.setdefault(repr(run.variant), []).append(run)
        return [self._row(of_variant) for of_variant in rows.values()]

    def _row(self, runs: Sequence[PlannedRun]) -> Row:
        records = [self.records[run.name] for run in runs if run.name in self.records]
        finished = [record for record in records if record["state"] == FINISHED]
        figures = {
            name: Spread(tuple(record[name] for record in finished))
            for name in self.figures
            if finished and all(name in record for record in finished)
        }
        first, failed = runs[0], sum(record["state"] == FAILED for record in records)
        variant = first.variant
        about = (variant.label, first.recipe, variant.settings, variant.shown)
        return Row(*about, first.exaflops, figures, len(runs), failed)

    def as_json(self) -> dict[str, Any]:
        """What study.json holds: the runs that have ended, in the order of the study."""
        ended = [self.records[run.name] for run in self.runs if run.name in self.records]
        ended = [record for record in ended if record["state"] in (FINISHED, FAILED)]
        return {
            "study": self.study.name,
            "title": self.study.title,
            "recipe": self.study.recipe,
            "planned": len(self.runs),
            "runs": [self._run(record) for record in ended],
        }

    def _run(self, record: Mapping[str, Any]) -> dict[str, Any]:
        names = (*_KEPT, *([self.few_shot, f"{self.few_shot}_ema"] if self.few_shot else []))
        found = {name: record[name] for name in names if name in record}
        missing = {name: None for name in ("top1", self.few_shot) if name and name not in found}
        label = {} if record["label"] is None else {"label": record["label"]}
        return {**label, **found, **missing, "recipe": record["recipe"], "command": record["command"]}

    def write(self, folder: Path) -> list[Path]:
        """Writes study.json and table.md."""
        paths = [folder / "study.json", folder / "table.md"]
        atomic_write(paths[0], json.dumps(self.as_json(), indent=1) + "\n")
        atomic_write(paths[1], self.table())
        return paths

    def table(self) -> str:
        """In Markdown."""
        rows, figures = self.rows(), self.figures
        keys = [LABEL] if any(row.label for row in rows) else []
        keys += dict.fromkeys(key for row in rows for key in row.shown)
        recipes = len({row.recipe for row in rows}) > 1
        unit, size = self.unit
        ended = [len(next(iter(row.figures.values())).values) if row.figures else 0 for row in rows]
        uneven = any(count < row.planned for row, count in zip(rows, ended, strict=True))
        words = [*(["recipe"] if recipes else []), *_headings(keys)]
        numbers = [unit, *map(_name_of, figures), *(["runs finished"] if uneven else [])]
        lines = [f"# {shown(self.study.title or self.study.name)}", "", self._about(ended), ""]
        lines += [_cells([*words, *numbers]), "|" + "---|" * len(words) + "---:|" * len(numbers)]
        best = {name: max(row.figures[name].mean for row in rows if name in row.figures) for name in figures}
        for row, count in zip(rows, ended, strict=True):
            cells = [Path(row.recipe).stem] if recipes else []
            cells += [_cell(row, key) for key in keys]
            cells.append(f"{row.exaflops * size:.3g}")
            for name in figures:
                spread = row.figures.get(name)
                cells.append("" if spread is None else _percent(spread, best=spread.mean == best[name]))
            failed = f", {row.failed} failed" if row.failed else ""
            cells += [f"{count} of {row.planned}{failed}"] if uneven else []
            lines.append(_cells(cells))
        lines += ["", *self._failures(), "The machine and the versions of each run are in its `environment.json`."]
        return "\n".join(lines) + "\n"

    def _about(self, ended: Sequence[int]) -> str:
        """What the figures of the table are."""
        images = {record["samples"] for record in self.records.values() if "samples" in record}
        on = f" on {counted(images.pop(), 'image')}" if len(images) == 1 else ""
        seeds = max(ended, default=0)
        spread = (
            f"mean and standard deviation (of the population) over {counted(seeds, 'seed')}; the best mean is bold"
            if seeds > 1
            else "one seed, so nothing is known of their spread; the best is bold"
        )
        few_shot = ""
        if self.few_shot in self.figures:
            few_shot = f" {self.study.shots}-shot: a linear classifier on the features of that many images per class, "
            few_shot += "mean of three choices of images."
        finished = sum(ended)
        so_far = "" if finished == len(self.runs) else f" {finished} of {len(self.runs)} runs are finished."
        return f"Accuracies at the end of each run{on}: {spread}.{few_shot}{so_far}"

    def _failures(self) -> list[str]:
        failed = [(run, self.records[run.name]) for run in self.runs if run.name in self.records]
        lines = [
            f"* {shown(run.title)}: {shown(record['failed'])}" for run, record in failed if record["state"] == FAILED
        ]
        return ["Failed:", "", *lines, ""] if lines else []


def _headings(keys: Sequence[str]) -> list[str]:
    """The last parts of keys; of two with the same, the whole keys."""
    names = [key if key == LABEL else short(key) for key in keys]
    names = [key if names.count(name) > 1 else name for key, name in zip(keys, names, strict=True)]
    return ["" if name == LABEL else f"`{name}`" for name in names]


def _name_of(figure: str) -> str:
    return "top-1" if figure == "top1" else f"{figure.removeprefix('fewshot')}-shot"


def _cell(row: Row, key: str) -> str:
    """The value of a key in the table; empty if the run leaves it to its recipe, or its label says it."""
    value = row.value(key)
    if key == LABEL and value is None and not row.shown:
        return Path(row.recipe).stem
    return value_text(value) if key in row.shown or (key == LABEL and value is not None) else ""


def _percent(spread: Spread, *, best: bool) -> str:
    text = f"{100 * spread.mean:.1f}"
    text = f"**{text}**" if best else text
    return f"{text} %" if len(spread.values) == 1 else f"{text} % ± {100 * spread.std:.1f}"


def _cells(cells: Iterable[str]) -> str:
    return f"| {' | '.join(shown(cell).replace('|', chr(92) + '|') for cell in cells)} |"
