"""Few-shot accuracy: a linear classifier in closed form on frozen features, from a few samples of each class.

The protocol of the ViT paper (section 4.1) and of big_vision's `fewshot_lsr`: least squares with L2 regularisation on
whitened features, towards targets of -1 and +1. All arithmetic is in float64.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastvit_engine.errors import UserError
from fastvit_engine.observe.metrics import ShotFigures

SHOTS = (1, 5, 10, 25)
SEEDS = 3
L2 = 1024.0
_BIAS = 100.0  # the constant feature
_EPS = 1e-5  # added to the standard deviation of each feature
_CHUNK = 1 << 24  # numbers that are whitened or scored at a time

Array = NDArray[np.float64]


class Task(NamedTuple):
    """One classifier to fit."""

    shots: int
    seed: int


def few_shot_accuracy(
    train_x: ArrayLike,
    train_y: ArrayLike,
    eval_x: ArrayLike,
    eval_y: ArrayLike,
    *,
    shots: int,
    num_classes: int,
    seed: int,
    l2: float = L2,
) -> float:
    """Share of `eval_x` that a classifier fitted to `shots` samples per class gets right, 0 to 1.

    train_x [N, R], train_y [N], eval_x [M, R], eval_y [M]: features of any real type, and classes in
    [0, num_classes). seed: of the choice of samples; one generator serves all classes in order. A class with fewer
    samples than `shots` gives all it has; one without any has only the target -1.

    Raises UserError if shapes do not fit, a feature is not finite, a class is out of range, or there is no sample.
    """
    features, labels = _checked(train_x, train_y, num_classes, "train")
    test, truth = _checked(eval_x, eval_y, num_classes, "eval")
    if features.shape[1] != test.shape[1]:
        raise UserError(
            f"the training features have {features.shape[1]} columns and the evaluation features {test.shape[1]}: "
            "both must come from one model"
        )
    if shots < 1:
        raise UserError(f"shots is {shots}: give the number of samples per class, 1 or more")
    if not (0 < l2 < np.inf):
        raise UserError(f"l2 is {l2:g}: give a strength of the regularisation above 0, such as {L2:g}")
    rows = choose_rows(labels, shots, seed)
    chosen, classes = features[rows].astype(np.float64), labels[rows]
    mean, std = chosen.mean(axis=0), chosen.std(axis=0) + _EPS
    columns = _columns(classes, num_classes)
    weights = _fit(_whitened(chosen, mean, std), np.searchsorted(columns, classes), len(columns), l2)
    right, size = 0, max(1, _CHUNK // max(weights.shape))
    for start in range(0, len(test), size):
        scores = _whitened(test[start : start + size].astype(np.float64), mean, std) @ weights
        right += int((columns[scores.argmax(axis=1)] == truth[start : start + size]).sum())
    return right / len(test)


def choose_rows(labels: NDArray[np.int64], shots: int, seed: int) -> NDArray[np.int64]:
    """The rows that a classifier is fitted to: up to `shots` of each class, class by class."""
    generator = np.random.default_rng(seed)
    order = np.argsort(labels, kind="stable")  # of each class in turn, the rows in order
    _, starts = np.unique(labels[order], return_index=True)
    return np.concatenate([generator.permutation(rows)[:shots] for rows in np.split(order, starts[1:])])


def tasks(shots: Iterable[int], seeds: int) -> list[Task]:
    """A classifier for each number of shots and each of the seeds 0, 1, ..."""
    return [Task(number, seed) for number in shots for seed in range(seeds)]


def summarize(accuracies: Iterable[tuple[Task, float]]) -> dict[str, ShotFigures]:
    """The figures by the number of shots, as text: the form of `fastvit fewshot --json` and of `metrics.jsonl`."""
    by_shots: dict[int, list[float]] = {}
    for task, accuracy in sorted(accuracies):
        by_shots.setdefault(task.shots, []).append(accuracy)
    return {
        str(shots): {"mean": float(np.mean(values)), "std": float(np.std(values)), "seeds": values}
        for shots, values in by_shots.items()
    }


def classes_of(train_y: NDArray[np.int64], eval_y: NDArray[np.int64]) -> int:
    """The number of classes that labels speak of."""
    return int(max(train_y.max(initial=-1), eval_y.max(initial=-1))) + 1


def shortages(train_y: NDArray[np.int64], eval_y: NDArray[np.int64], shots: Sequence[int]) -> list[str]:
    """A sentence for everything about the classes that makes the figures other than they seem."""
    present, counts = np.unique(train_y, return_counts=True)
    said = []
    missing = np.setdiff1d(eval_y, present)
    if len(missing):
        lost = int(np.isin(eval_y, missing).sum())
        said.append(
            f"{_classes(len(missing))} of the evaluation data (first: class {missing[0]}) {_have(len(missing))} no "
            f"training sample: their {lost:,} of {len(eval_y):,} evaluation samples cannot be right"
        )
    for number in shots:
        few = present[counts < number]
        if len(few):
            said.append(
                f"{number} shots: {_classes(len(few))} (first: class {few[0]}) {_have(len(few))} fewer training "
                "samples and give all of them"
            )
    return said


def _classes(count: int) -> str:
    return "1 class" if count == 1 else f"{count:,} classes"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def _checked(
    features: ArrayLike, labels: ArrayLike, num_classes: int, name: str
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Features and labels as arrays of a form that can be computed with. Raises UserError for others."""
    x, y = np.asarray(features), np.asarray(labels)
    if x.ndim != 2 or y.ndim != 1 or len(x) != len(y):
        raise UserError(
            f"{name}_x is of shape {list(x.shape)} and {name}_y of {list(y.shape)}: give features [N, R] and classes "
            "[N]"
        )
    if not np.issubdtype(y.dtype, np.integer) or not (np.issubdtype(x.dtype, np.floating) or x.dtype.kind in "iu"):
        raise UserError(f"{name}_x is of {x.dtype} and {name}_y of {y.dtype}: give real numbers and integers")
    if not x.size:
        raise UserError(f"{name}_x is of shape {list(x.shape)}, without any feature: give at least one sample")
    if y.min() < 0 or y.max() >= num_classes:
        wrong = y[(y < 0) | (y >= num_classes)][0]
        raise UserError(f"{name}_y has the class {wrong}, outside 0..{num_classes - 1}: give num_classes=")
    step = max(1, _CHUNK // x.shape[1])
    for start in range(0, len(x), step):
        bad = ~np.isfinite(x[start : start + step]).all(axis=1)
        if bad.any():
            raise UserError(
                f"row {start + int(bad.argmax())} of {name}_x is not finite: the model's weights are broken, or it "
                "overflows in this precision"
            )
    return x, y.astype(np.int64)


def _columns(classes: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """The classes that need a column: those with samples, and the first of the others, whose columns are all equal."""
    present = np.unique(classes)
    gaps = np.flatnonzero(present != np.arange(len(present)))
    absent = int(gaps[0]) if len(gaps) else len(present)
    return np.sort(np.append(present, absent)) if absent < num_classes else present


def _whitened(features: Array, mean: Array, std: Array) -> Array:
    """[N, R] -> [N, R + 1]: each feature with mean 0 and deviation 1 over the chosen rows, and the constant."""
    return np.concatenate([(features - mean) / std, np.full((len(features), 1), _BIAS)], axis=1)


def _fit(x: Array, columns: NDArray[np.int64], count: int, l2: float) -> Array:
    """(X'X + l2 I)^-1 X'Y [R + 1, count], for targets Y [N, count] of +1 in `columns` [N] and -1 elsewhere.

    With fewer samples than features it is X'(XX' + l2 I)^-1 Y, which is the same.
    """
    samples, width = x.shape
    if samples < width:
        y = np.full((samples, count), -1.0)
        y[np.arange(samples), columns] = 1.0
        return x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(samples), y)
    sums = np.zeros((count, width))  # of each class; Y itself would be [N, count]
    np.add.at(sums, columns, x)
    return np.linalg.solve(x.T @ x + l2 * np.eye(width), (2 * sums - x.sum(axis=0)).T)
