"""`metrics.jsonl`: one JSON object per line.

JSON has no NaN and no infinity; they are written as the strings "nan", "inf" and "-inf" and read back as floats.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, cast, get_type_hints

from fastvit_engine.errors import UserError
from fastvit_engine.files import append_json_lines, atomic_write, json_lines, read_json_lines
from fastvit_engine.observe.run_folder import RunFolder


class TrainRow(TypedDict):
    """A logged training step; rates and fractions are means over the steps since the previous row."""

    step: int  # optimizer steps taken, 1 after the first
    epoch: float | None  # None if the number of training samples is unknown
    samples: int  # training images consumed since step 0
    loss: float
    lr: float
    grad_norm: float | None  # before clipping
    images_per_second: float  # whole job
    mfu: float | None  # fraction of the peak FLOP/s, 0 to 1; None if the peak is unknown
    data_wait: float  # fraction of the step spent waiting for data, 0 to 1
    forward: NotRequired[float]  # likewise, on forward passes
    backward: NotRequired[float]  # likewise, on backward passes, which exchange gradients
    update: NotRequired[float]  # likewise, on the update: the rest of that exchange, checks, the optimizer
    memory_bytes: int  # peak of this process
    samples_hash: str  # hexadecimal, of the sample keys of the step
    seconds: float  # training time so far, restarts included
    flops: NotRequired[float]  # floating-point operations of training so far, restarts included
    bad_samples: NotRequired[int]  # training images so far that could not be used
    tokens: NotRequired[int]  # of the images of this step, with section packing; else every image has as many


class EvalRow(TypedDict):
    """One pass over the evaluation images."""

    step: int
    eval: str  # "eval", or "eval_ema" for the moving average of the weights
    top1: float  # fraction of images, 0 to 1
    top5: float | None  # None with five classes or fewer
    loss: float
    samples: int  # images evaluated
    seconds: float  # this evaluation


class LossRow(TypedDict):
    """One pass over the held-out images of a run that trains without labels: how well they are predicted."""

    step: int
    eval: str  # as in EvalRow
    loss: float
    samples: int  # images evaluated
    seconds: float  # this evaluation


class ShotFigures(TypedDict):
    """Accuracies of the classifiers with one number of shots, fractions of the images."""

    mean: float
    std: float  # over the seeds: the population's standard deviation
    seeds: list[float]


class FewShotRow(TypedDict):
    """Few-shot accuracy on frozen features."""

    step: int
    eval: str  # "fewshot", or "fewshot_ema" for the moving average of the weights
    shots: dict[str, ShotFigures]  # by the number of images per class, as `fastvit fewshot --json` has them
    l2: float
    samples: int  # images evaluated
    seconds: float  # this evaluation


class OwnRow(TypedDict):
    """What an evaluator that was given to `train` has measured."""

    step: int
    eval: str  # its name, with "_ema" behind it for the moving average of the weights
    figures: dict[str, float]
    seconds: float  # this evaluation


EvaluationRow = EvalRow | LossRow | FewShotRow | OwnRow
Row = TrainRow | EvaluationRow


class Metrics(NamedTuple):
    """The rows of `metrics.jsonl` by their form, in the order written."""

    train: list[TrainRow]
    evaluations: list[EvalRow]
    few_shot: list[FewShotRow]
    own: list[OwnRow]
    losses: list[LossRow]


class MetricsWriter:
    """Appends rows to `metrics.jsonl`; each outlives a kill at once. One process of the job has one.

    `resume_step` is the step training resumes from: rows of later steps, left by the run that died, are dropped, so
    that no step appears twice; 0 is a new run, or one that starts over. Damaged lines are dropped, too, and counted on
    stderr: nothing in this file decides how a run resumes. Raises OSError if the disk is full or lost.
    """

    def __init__(self, run: RunFolder, resume_step: int) -> None:
        run.path.mkdir(parents=True, exist_ok=True)
        _drop_rows_after(run.metrics, resume_step)
        self._path = run.metrics

    def write(self, row: Row) -> None:
        """Writes one row of plain Python numbers. Raises ValueError if a key of its form is missing or no number."""
        if problem := _problem(row):
            raise ValueError(f"metrics row {problem}")
        append_json_lines(self._path, [_encode(row)], durable=False)


def read_metrics(path: Path, named: str | None = None) -> tuple[list[TrainRow], list[EvalRow]]:
    """Reads the training and the evaluation rows in the order written.

    Half a last line is left out, and so are damaged lines, which stderr counts. Raises UserError if there is no file.
    named: what to call the file, if not by its path.
    """
    return read_all_metrics(path, named)[:2]


def read_all_metrics(path: Path, named: str | None = None) -> Metrics:
    """Reads all rows; see `read_metrics`."""
    try:
        rows = _read_rows(path, named)
    except OSError as error:
        raise UserError(f"cannot read the metrics of the run, {named or path}: {error.strerror}") from error
    metrics = Metrics([], [], [], [], [])
    for row in rows:
        if _form_of(row) is TrainRow:
            metrics.train.append(cast(TrainRow, row))
        elif _form_of(row) is EvalRow:
            metrics.evaluations.append(cast(EvalRow, row))
        elif _form_of(row) is FewShotRow:
            metrics.few_shot.append(cast(FewShotRow, row))
        elif _form_of(row) is OwnRow:
            metrics.own.append(cast(OwnRow, row))
        else:
            metrics.losses.append(cast(LossRow, row))
    return metrics


def _drop_rows_after(path: Path, step: int) -> None:
    """Keeps rows up to and including `step`."""
    if path.exists():
        append_json_lines(path, [])  # says so if the last line is torn
        atomic_write(path, json_lines(_encode(row) for row in _read_rows(path) if row["step"] <= step))


def _read_rows(path: Path, named: str | None = None) -> list[dict[str, Any]]:
    return [_decode(row) for row in read_json_lines(path, lambda row: _problem(_decode(row)), named)]


def _problem(row: Mapping[str, Any]) -> str | None:
    """Why `row` is not a metrics row, or None if it is one."""
    form = _form_of(row)
    for key, kind in _KINDS[form].items():
        if key not in row:
            if key in form.__required_keys__:
                return f"lacks '{key}'"
        elif key == "shots":
            if not _are_shots(row[key]):
                return f"has shots {row[key]!r}, not figures of few-shot accuracy"
        elif key == "figures":
            if not _are_figures(row[key]):
                return f"has figures {row[key]!r}, not numbers by name"
        elif not isinstance(row[key], kind) or isinstance(row[key], bool):
            return f"has {key} {row[key]!r}, not {_NAMES.get(kind, 'a number')}"
        elif key == "seconds" and not math.isfinite(row[key]):
            return f"has seconds {row[key]}, not a duration"
        elif isinstance(row[key], int) and abs(row[key]) >= 2**63:
            return f"has a {key} of too many digits"
    return None


def _form_of(row: Mapping[str, Any]) -> Any:
    if "eval" not in row:
        return TrainRow
    if "figures" in row:
        return OwnRow
    if "shots" in row:
        return FewShotRow
    return EvalRow if "top1" in row or "top5" in row else LossRow


def _are_shots(value: Any) -> bool:
    """Whether a value is what FewShotRow has as `shots`."""
    return isinstance(value, dict) and all(
        shots.isdecimal()
        and isinstance(found, dict)
        and found.keys() == {"mean", "std", "seeds"}
        and isinstance(found["seeds"], list)
        and all(type(number) in (int, float) for number in (found["mean"], found["std"], *found["seeds"]))
        for shots, found in value.items()
    )


def _are_figures(value: Any) -> bool:
    """Whether a value is what OwnRow has as `figures`."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and type(number) in (int, float) for name, number in value.items()
    )


_NAMES: dict[Any, str] = {int: "an integer", str: "a text"}


def _kinds(form: type) -> dict[str, Any]:
    """What isinstance takes for each key of a form: an integer is a float, too."""
    return {key: kind if kind in (int, str) else int | kind for key, kind in get_type_hints(form).items()}


_KINDS: dict[type, dict[str, Any]] = {form: _kinds(form) for form in (TrainRow, EvalRow, LossRow, FewShotRow, OwnRow)}


def _encode(row: Any) -> Any:
    """The row as JSON can hold it."""
    if isinstance(row, float) and not math.isfinite(row):
        return str(float(row))
    return _in_all_parts(_encode, row)


def _decode(row: Any) -> Any:
    if isinstance(row, str) and row in ("nan", "inf", "-inf"):
        return float(row)
    return _in_all_parts(_decode, row)


def _in_all_parts(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: change(part) for key, part in value.items()}
    return [change(part) for part in value] if isinstance(value, list) else value
