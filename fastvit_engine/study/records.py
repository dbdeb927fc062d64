"""What is kept of the runs of a study: a record each, and the folders they lie in."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvit_engine.errors import UserError
from fastvit_engine.files import atomic_write
from fastvit_engine.observe.metrics import read_all_metrics
from fastvit_engine.study.planning import PlannedRun, same_settings

FINISHED, FAILED, BEGUN = "finished", "failed", "begun"


@dataclass(frozen=True)
class StudyFolder:
    """The folder of a study: runs/, logs/ and records/, and the results."""

    path: Path

    def run(self, run: PlannedRun) -> Path:
        return self.path / "runs" / run.name

    def log(self, run: PlannedRun) -> Path:
        """What the commands of a run have printed."""
        return self.path / "logs" / f"{run.name}.log"

    def _record(self, run: PlannedRun) -> Path:
        return self.path / "records" / f"{run.name}.json"

    def record(self, run: PlannedRun) -> dict[str, Any] | None:
        """The record of a run; None if it was never started.

        Raises UserError if it is of a run with other settings, or cannot be read.
        """
        path = self._record(run)
        try:
            record: dict[str, Any] = json.loads(path.read_text())
            state, settings = record["state"], record["made_of"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{path} is not a whole record: remove it, and the run is measured again") from None
        if not isinstance(settings, dict) or state not in (FINISHED, FAILED, BEGUN):
            raise UserError(f"{path} is not a record of a study: remove it, and the run is measured again")
        if not same_settings(settings, run):
            raise UserError(
                f"{path} is of other settings than this study has now ({_difference(settings, run.made_of)}): set them "
                "back, or choose another folder with --out"
            )
        return record

    def records(self, runs: Iterable[PlannedRun]) -> dict[str, dict[str, Any]]:
        """The records that there are, by the names of the runs."""
        found = {run.name: self.record(run) for run in runs}
        return {name: record for name, record in found.items() if record is not None}

    def write(self, run: PlannedRun, state: str, **facts: Any) -> dict[str, Any]:
        """Writes and returns the record of a run."""
        record = {
            "state": state,
            "label": run.variant.label,
            "recipe": run.recipe,
            "settings": run.settings,
            "steps": run.steps,
            "images": run.images,
            "exaflops": run.exaflops,
            **facts,
            "made_of": run.made_of,
        }
        path = self._record(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(record, indent=1) + "\n")
        return record


def figures_of(folder: Path, shots: int | None) -> dict[str, Any]:
    """What a finished run reached, by the last rows of its metrics.

    "top1", "loss", "samples" (images evaluated), "fewshotN" and "train_seconds"; with an average of the weights, also
    "top1_ema" and "fewshotN_ema". Raises UserError if a row is missing.
    """
    metrics = read_all_metrics(folder / "metrics.jsonl")
    last = metrics.train[-1]["step"] if metrics.train else 0
    found: dict[str, Any] = {"train_seconds": metrics.train[-1]["seconds"] if metrics.train else 0.0}
    for row in metrics.evaluations:
        if row["step"] >= last:
            suffix = row["eval"].removeprefix("eval")
            found |= {f"top1{suffix}": row["top1"], f"loss{suffix}": row["loss"], "samples": row["samples"]}
    for few_shot in metrics.few_shot:
        figures = few_shot["shots"].get(str(shots))
        if few_shot["step"] >= last and figures is not None:
            found[f"fewshot{shots}{few_shot['eval'].removeprefix('fewshot')}"] = figures["mean"]
    missing = [] if shots is None or f"fewshot{shots}" in found else [f"{shots}-shot accuracy"]
    if "top1" not in found and (shots is None or missing):
        missing.insert(0, "top-1")
    if missing:
        raise UserError(f"{folder / 'metrics.jsonl'} has no {' and no '.join(missing)} of the last step")
    return found


def _difference(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """The first setting in which two configurations differ."""
    for key in [*now, *(key for key in before if key not in now)]:
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            return _difference(old, new, f"{prefix}{key}.")
        return f"{prefix}{key} was {json.dumps(old)} and is {json.dumps(new)}"
    return "keys that this version does not know"
