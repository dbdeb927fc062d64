"""Quantities of a run over its steps, as charts take them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastvit_engine.observe.metrics import FewShotRow
from fastvit_engine.observe.report.axes import Array
from fastvit_engine.observe.report.chart import Series


def series(
    name: str,
    style: str,
    rows: Sequence[Mapping[str, Any]],
    key: str,
    *,
    scale: float = 1.0,
    **options: Any,
) -> Series:
    """One key of the rows that have it. options: as `Series` has them."""
    rows = [row for row in rows if key in row]
    return Series(name, style, column(rows, "step"), scale * column(rows, key), **options)


def column(rows: Iterable[Mapping[str, Any]], key: str) -> Array:
    """[N] float64 of one key; NaN for null."""
    return np.array([np.nan if row[key] is None else row[key] for row in rows], dtype=np.float64)


def median(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The median of one key; None if no row has a finite value."""
    values = column([row for row in rows if key in row], key)
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def few_shot_numbers(rows: Iterable[FewShotRow]) -> list[int]:
    """The numbers of images per class that few-shot accuracy was measured with."""
    return sorted({int(shots) for row in rows for shots in row["shots"]})


def few_shot_series(rows: Sequence[FewShotRow], kind: str, shots: int, name: str, style: str, **options: Any) -> Series:
    """Accuracy in per cent. kind: "fewshot" or "fewshot_ema"."""
    means = [
        {"step": row["step"], "mean": row["shots"][str(shots)]["mean"] if str(shots) in row["shots"] else None}
        for row in rows
        if row["eval"] == kind
    ]
    return series(name, style, means, "mean", scale=100, points=True, **options)
