"""Soft labels in a member of a sample."""

import io

import numpy as np
import pytest

from fastvit_engine.data.shards.soft_labels import MOST_IN_A_BLOCK, format_soft_label, parse_soft_label
from fastvit_engine.data.shards.tar import BLOCK

ROW = [("class", "<u4"), ("probability", "<f4")]


def _softmax(classes: int, sharpness: float = 4.0) -> np.ndarray:
    scores = np.exp(sharpness * np.random.default_rng(0).standard_normal(classes))
    return (scores / scores.sum()).astype(np.float32)


def _best(probabilities: np.ndarray, top: int) -> np.ndarray:
    return np.argsort(-probabilities, kind="stable")[:top]


def _member(*rows: tuple[int, float], dtype=ROW) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(list(rows), dtype))
    return file.getvalue()


def test_all_classes_come_back_as_they_were():
    probabilities = _softmax(10)
    order = _best(probabilities, 10)
    label = parse_soft_label(format_soft_label(order, probabilities[order], 10))
    assert label.num_classes == 10 and label.rest == 0 and np.array_equal(label.probabilities, probabilities[order])
    np.testing.assert_allclose(label.dense(10), probabilities, rtol=1e-6)


def test_no_more_than_the_rest_is_in_the_wrong_place():
    probabilities = _softmax(1000)
    order = _best(probabilities, MOST_IN_A_BLOCK)
    content = format_soft_label(order, probabilities[order], 1000)
    label = parse_soft_label(content)
    assert len(content) == BLOCK
    assert label.held == pytest.approx(probabilities[order].sum(), abs=1e-6) and 0.9 < label.held < 1
    dense = label.dense(1000)
    assert dense.sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(dense[order], probabilities[order], rtol=1e-6)
    assert np.abs(dense - probabilities).sum() / 2 < label.rest


def test_a_model_of_more_classes_gives_the_others_nothing():
    label = parse_soft_label(_member((2, 0.75), (4, 0.25)))
    assert label.dense(6).tolist() == pytest.approx([1 / 12, 1 / 12, 0.75, 1 / 12, 0, 0])


def test_numpy_opens_a_member():
    rows = np.load(io.BytesIO(format_soft_label(np.array([7, 1]), np.array([0.5, 0.25], np.float32), 9)))
    assert rows.tolist() == [(7, 0.5), (1, 0.25), (9, 0.25)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"0.5 0.5", "are no NumPy array"),
        (b"", "are no NumPy array"),
        (_member((0, 0.5), (9, 0.5))[:-1], "are cut short"),
        (_member((0, 0.5), (9, 0.5)) + b"\0", "have bytes after their end"),
        (_member((9, 1.0)), r"of shape \[1\]"),
        (_member((0, 0.5), (9, 0.5), dtype=[("class", "<i8"), ("probability", "<f4")]), "not rows of class"),
        (_member((1, 0.5), (1, 0.5), (9, 0.0)), "name a class twice"),
        (_member((9, 0.5), (9, 0.5)), "name class 9 of 9 classes"),
        (_member((0, 1.5), (9, -0.5)), "not between 0 and 1"),
        (_member((0, float("nan")), (9, 0.5)), "not between 0 and 1"),
        (_member((0, 0.5), (9, 0.25)), r"a sum of 0\.75, not 1"),
        (_member((0, 0.5), (1, 0.25), (2, 0.25)), "for other classes, and there are none"),
    ],
)
def test_what_is_no_distribution_is_refused(content, reason):
    with pytest.raises(ValueError, match=reason):
        parse_soft_label(content)
