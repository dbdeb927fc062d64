"""`metrics.jsonl`: one JSON object a line.

JSON has no NaN and no infinity; they are written as the strings "nan", "inf" and "-inf" and read back as floats.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from fastvit_engine.errors import UserError
from fastvit_engine.files import atomic_write
from fastvit_engine.observe.run_folder import RunFolder


class TrainRow(TypedDict):
    """A logged training step; rates and shares are means over the steps since the row before."""

    step: int  # optimizer steps taken, 1 after the first
    epoch: float | None  # None where the number of training samples is unknown
    samples: int  # training images consumed since step 0
    loss: float
    lr: float
    grad_norm: float | None  # before clipping
    images_per_second: float  # whole job
    mfu: float | None  # share of the peak FLOP/s, 0 to 1; None where the peak is unknown
    data_wait: float  # share of the step spent waiting for data, 0 to 1
    memory_bytes: int  # peak of this process
    samples_hash: str  # hexadecimal, of the sample keys of the step
    seconds: float  # training time so far, over restarts
    bad_samples: NotRequired[int]  # training images so far that could not be used


class EvalRow(TypedDict):
    """One pass over the evaluation images."""

    step: int
    eval: str  # "eval", or "eval_ema" for the moving average of the weights
    top1: float  # share of images, 0 to 1
    top5: float | None  # None with five classes or fewer
    loss: float
    samples: int  # images evaluated
    seconds: float  # this evaluation


class MetricsWriter:
    """Appends rows to `metrics.jsonl`, flushed one by one. One process of the job has one.

    `resume_step` is the step training continues from: rows of later steps, left by the run that died, are dropped, so
    that no step appears twice; 0 starts over in the same folder. None is a new run, and refuses a folder that already
    has rows. Raises UserError for that, and for a damaged file.
    """

    def __init__(self, run: RunFolder, resume_step: int | None) -> None:
        run.path.mkdir(parents=True, exist_ok=True)
        if resume_step is not None:
            _drop_rows_after(run.metrics, resume_step)
        elif run.metrics.exists() and run.metrics.stat().st_size > 0:
            raise UserError(
                f"{run.metrics} already has the metrics of a run: resume that run, or choose another folder"
            )
        self._file = open(run.metrics, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run, see close()

    def write(self, row: TrainRow | EvalRow) -> None:
        """Writes one row of plain Python numbers. ValueError where a key of its form is missing."""
        if problem := _problem(row):
            raise ValueError(f"metrics row {problem}")
        self._file.write(json.dumps({key: _encode(value) for key, value in row.items()}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: Path) -> tuple[list[TrainRow], list[EvalRow]]:
    """The training and the evaluation rows in the order written. A half-written last line is left out.

    Raises UserError where the file is missing or another line is not a metrics row.
    """
    rows = _read_rows(path)
    train = [cast(TrainRow, row) for row in rows if "eval" not in row]
    return train, [cast(EvalRow, row) for row in rows if "eval" in row]


def _drop_rows_after(path: Path, step: int) -> None:
    """Keeps rows up to and including `step`."""
    if path.exists():
        kept = [row for row in _read_rows(path) if row["step"] <= step]
        lines = (json.dumps({key: _encode(value) for key, value in row.items()}, allow_nan=False) for row in kept)
        atomic_write(path, "".join(f"{line}\n" for line in lines))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read the metrics of the run, {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            if number == len(lines):  # a writer was killed inside this line, or is writing it now
                break
            raise UserError(f"{path} line {number} is not JSON: the file is damaged, remove that line") from None
        if problem := _problem(row):
            raise UserError(f"{path} line {number} {problem}: the file is damaged, remove that line")
        rows.append({key: _decode(value) for key, value in row.items()})
    return rows


def _problem(row: Any) -> str | None:
    """Why `row` is no metrics row, or None when it is one."""
    if not isinstance(row, Mapping):
        return "is not a JSON object"
    form = EvalRow if "eval" in row else TrainRow
    missing = [key for key in form.__annotations__ if key in form.__required_keys__ and key not in row]
    if missing:
        return f"lacks '{missing[0]}'"
    if type(row["step"]) is not int:
        return f"has step {row['step']!r}, not an integer"
    return None


def _encode(value: Any) -> Any:
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def _decode(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in ("nan", "inf", "-inf") else value
