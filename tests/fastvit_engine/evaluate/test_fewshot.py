"""Few-shot accuracy against the formula written out, and against scikit-learn."""

import numpy as np
import pytest

from fastvit_engine.errors import UserError
from fastvit_engine.evaluate.fewshot import Task, classes_of, few_shot_accuracy, shortages, summarize, tasks


def scores_of_numpy(train_x, train_y, eval_x, *, shots, num_classes, seed, l2):
    """The definition, step by step: predictions and whitened features."""
    generator = np.random.default_rng(seed)
    rows = np.concatenate(
        [generator.permutation(np.flatnonzero(train_y == c))[:shots] for c in range(num_classes)]
    ).astype(int)
    x, y = np.asarray(train_x, np.float64)[rows], np.where(train_y[rows, None] == np.arange(num_classes), 1.0, -1.0)
    mean, std = x.mean(0), np.sqrt(((x - x.mean(0)) ** 2).mean(0)) + 1e-5
    x = np.c_[(x - mean) / std, np.full(len(x), 100.0)]
    test = np.c_[(np.asarray(eval_x, np.float64) - mean) / std, np.full(len(eval_x), 100.0)]
    weights = np.linalg.inv(x.T @ x + l2 * np.eye(x.shape[1])) @ x.T @ y
    return test @ weights, (x, y, test)


def clusters(rng, count, width, num_classes, spread=2.5):
    centres = rng.normal(size=(num_classes, width))
    labels = rng.integers(0, num_classes, count)
    return (centres[labels] + spread * rng.normal(size=(count, width))).astype(np.float32), labels, centres


@pytest.fixture(scope="module", params=[8, 150], ids=["narrow", "wide"])
def data(request):
    """Seven classes, some of fewer than 25 samples, and features of which two are constant."""
    rng = np.random.default_rng(5)
    x, y, _ = clusters(rng, 400, request.param, 7)
    train_x, train_y, eval_x, eval_y = x[:260], y[:260], x[260:], y[260:]
    train_x, train_y = (
        np.delete(train_x, np.flatnonzero(train_y == 4)[12:], 0),
        np.delete(train_y, np.flatnonzero(train_y == 4)[12:]),
    )
    for part in (train_x, eval_x):
        part[:, 1], part[:, 3] = 0.1, 1e4 + part[:, 3]
    return train_x, train_y, eval_x, eval_y


@pytest.mark.parametrize("shots", [1, 5, 10, 25])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_formula_and_ridge_regression(data, shots, seed):
    """With fewer samples than features and with more: 7 to 162 samples of 8 or 150 features."""
    train_x, train_y, eval_x, eval_y = data
    given = {"shots": shots, "num_classes": 7, "seed": seed}
    scores, (x, y, test) = scores_of_numpy(train_x, train_y, eval_x, l2=1024.0, **given)
    measured = few_shot_accuracy(train_x, train_y, eval_x, eval_y, **given)
    assert measured == (scores.argmax(1) == eval_y).mean()
    linear_model = pytest.importorskip("sklearn.linear_model")
    ridge = linear_model.Ridge(alpha=1024.0, fit_intercept=False).fit(x, y)
    assert np.abs(ridge.predict(test) - scores).max() < 1e-9
    assert measured == (ridge.predict(test).argmax(1) == eval_y).mean()


def test_both_forms_of_the_solution_agree():
    from fastvit_engine.evaluate.fewshot import _fit

    rng = np.random.default_rng(0)
    for samples, width in ((20, 20), (20, 21), (21, 20), (3, 40), (40, 3)):
        x, columns = rng.normal(size=(samples, width)), rng.integers(0, 3, samples)
        y = np.where(columns[:, None] == np.arange(3), 1.0, -1.0)
        expected = np.linalg.inv(x.T @ x + 7.0 * np.eye(width)) @ x.T @ y
        assert np.abs(_fit(x, columns, 3, 7.0) - expected).max() < 1e-12


@pytest.mark.parametrize("l2", [1e-3, 1.0, 1e6])
def test_the_strength_of_the_regularisation_counts(data, l2):
    train_x, train_y, eval_x, eval_y = data
    given = {"shots": 10, "num_classes": 7, "seed": 1, "l2": l2}
    scores, _ = scores_of_numpy(train_x, train_y, eval_x, **given)
    assert few_shot_accuracy(train_x, train_y, eval_x, eval_y, **given) == (scores.argmax(1) == eval_y).mean()


@pytest.mark.parametrize("num_classes", [9, 12, 1000])
def test_classes_without_samples_have_only_the_target_minus_one(num_classes):
    """Classes 2 and 5 lie between others, and those from 8 on behind them; one of them may be predicted."""
    rng = np.random.default_rng(3)
    x, y, _ = clusters(rng, 300, 20, 8)
    known = (y != 2) & (y != 5)
    train_x, train_y = x[:200][known[:200]], y[:200][known[:200]]
    train_x[train_y == 0] *= 40.0  # so that scores far from the samples are below those of absent classes
    given = {"shots": 5, "num_classes": num_classes, "seed": 0, "l2": 1e5}
    scores, _ = scores_of_numpy(train_x, train_y, x[200:] * 30, **given)
    expected = (scores.argmax(1) == y[200:]).mean()
    assert few_shot_accuracy(train_x, train_y, x[200:] * 30, y[200:], **given) == expected


def test_digits_from_raw_pixels():
    x, y = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:1438], order[1438:]
    figures = summarize(
        (task, few_shot_accuracy(x[train], y[train], x[test], y[test], num_classes=10, **task._asdict()))
        for task in tasks([1, 5, 25], 3)
    )
    assert figures["5"]["mean"] == pytest.approx(0.816, abs=5e-4)
    assert figures["1"]["mean"] < figures["5"]["mean"] < figures["25"]["mean"]


def test_figures_are_means_over_the_seeds():
    assert tasks([5, 1], 2) == [(5, 0), (5, 1), (1, 0), (1, 1)]
    given = [(Task(5, 1), 0.75), (Task(5, 0), 0.25), (Task(10, 0), 0.5)]
    assert summarize(given) == {
        "5": {"mean": 0.5, "std": 0.25, "seeds": [0.25, 0.75]},
        "10": {"mean": 0.5, "std": 0.0, "seeds": [0.5]},
    }


def test_a_model_is_not_asked_for_more_memory_than_its_classes_need():
    """A label of ten million is one class more, not ten million columns."""
    rng = np.random.default_rng(0)
    x, y, _ = clusters(rng, 60, 30, 2, spread=0.3)
    y = np.where(y == 1, 9_999_999, 0)
    given, hot = {"shots": 5, "num_classes": 10_000_000, "seed": 0}, np.minimum(y, 1)
    assert few_shot_accuracy(x[:40], y[:40], x[40:], y[40:], **given) == 1.0
    for width in (3, 30):  # both forms of the solution
        few = few_shot_accuracy(x[:40, :width], hot[:40], x[40:, :width], hot[40:], **{**given, "num_classes": 2})
        assert few_shot_accuracy(x[:40, :width], y[:40], x[40:, :width], y[40:], **given) == few > 0.5


def test_what_makes_figures_other_than_they_seem_is_said():
    train, evaluation = np.array([0, 0, 0, 1, 3]), np.array([0, 2, 2, 3, 5])
    assert classes_of(train, evaluation) == 6
    assert shortages(train, evaluation, [1, 2]) == [
        "2 classes of the evaluation data (first: class 2) have no training sample: their 3 of 5 evaluation samples "
        "cannot be right",
        "2 shots: 2 classes (first: class 1) have fewer training samples and give all of them",
    ]
    assert shortages(train, train, [1]) == []


X, Y = np.ones((4, 3)), np.array([0, 1, 0, 1])
GIVEN = {"shots": 1, "num_classes": 2, "seed": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_x": np.where(np.arange(12).reshape(4, 3) == 7, np.nan, 1.0)}, "row 2 of train_x is not finite"),
        ({"eval_x": np.where(np.arange(12).reshape(4, 3) == 11, np.inf, 1.0)}, "row 3 of eval_x is not finite"),
        ({"eval_y": np.array([0, 1, 2, 0])}, "eval_y has the class 2, outside 0..1"),
        ({"train_y": np.array([0, -1, 1, 0])}, "train_y has the class -1, outside 0..1"),
        ({"train_y": np.array([0, 1])}, r"train_x is of shape \[4, 3\] and train_y of \[2\]"),
        ({"train_y": np.array([0.0, 1, 0, 1])}, "train_y of float64: give real numbers and integers"),
        ({"eval_x": np.ones((4, 2))}, "training features have 3 columns and the evaluation features 2"),
        ({"eval_x": np.ones((0, 3)), "eval_y": np.zeros(0, int)}, r"eval_x is of shape \[0, 3\]"),
        ({"train_x": np.full((4, 3), "a")}, "train_x is of <U1"),
        ({"shots": 0}, "shots is 0"),
        ({"l2": 0.0}, "l2 is 0"),
        ({"l2": float("nan")}, "l2 is nan"),
    ],
)
def test_what_cannot_be_computed_with_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        few_shot_accuracy(**{"train_x": X, "train_y": Y, "eval_x": X, "eval_y": Y, **GIVEN, **changes})
