"""What a model says of each image, and the figures, table and picture that follow from it."""

import numpy as np
import pytest
import torch

from fastvit_engine.data import Batch
from fastvit_engine.errors import UserError
from fastvit_engine.evaluate.classification import evaluate
from fastvit_engine.evaluate.confusion import Confusion
from fastvit_engine.evaluate.record import Right, figures_of, real_accuracy, record_answers
from fastvit_kernels import FusedCrossEntropy

LABELS = [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 6, 6]


class Scores(torch.nn.Module):
    """Scores of seven outputs that depend on the image alone."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(256, 7, generator=torch.Generator().manual_seed(4)))

    def forward(self, images):
        return self.table[images[:, 0, 0, 0].long()]


def batches(labels=LABELS, bad=(), size=5):
    """Images in an order of their own, the last batch padded, with the numbers in `bad` undecodable."""
    order = np.random.default_rng(1).permutation(len(labels))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        padding = size - len(rows)
        images = torch.zeros(size, 2, 2, 3, dtype=torch.uint8)
        images[: len(rows)] = torch.from_numpy(rows.astype(np.uint8)).view(-1, 1, 1, 1)
        chosen = torch.tensor([labels[row] for row in rows])
        filled = torch.cat([chosen, torch.zeros(padding, *chosen.shape[1:], dtype=torch.int64)])
        weights = torch.tensor([float(row not in bad) for row in rows] + [0.0] * padding)
        keys = [f"k{row}" for row in rows] + [""] * padding
        yield Batch(images, filled, weights, keys, np.concatenate([rows, np.zeros(padding, np.int64)]))


def test_figures_equal_those_of_evaluation_in_training():
    model = Scores().train()
    expected, _ = evaluate(model, batches(), FusedCrossEntropy("softmax"))
    record = record_answers(model, batches(), Right.all(7), "softmax")
    assert model.training
    found = figures_of(record)
    assert (found.samples, found.top1, found.top5) == (expected.samples, expected.top1, expected.top5)
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    assert record.keys == [f"k{n}" for n in range(12)] and record.positions.tolist() == list(range(12))
    assert record.right[:, 0].tolist() == LABELS
    assert record.ranked.tolist() == model.table[:12].topk(5, dim=1).indices.tolist()


def test_several_labels_and_a_sigmoid_loss_as_in_training():
    labels = [[first, (first + 2) % 7 if n % 2 else -1] for n, first in enumerate(LABELS)]
    expected, _ = evaluate(Scores(), batches(labels), FusedCrossEntropy("sigmoid"))
    found = figures_of(record_answers(Scores(), batches(labels), Right.all(7), "sigmoid"))
    assert (found.samples, found.top1, found.top5) == (expected.samples, expected.top1, expected.top5)
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)


def test_bad_samples_and_padding_do_not_count():
    record = record_answers(Scores(), batches(bad={3, 11}), Right.all(7), "softmax")
    assert record.positions.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10] and figures_of(record).samples == 10
    with pytest.raises(UserError, match="no sample has a usable image"):
        record_answers(Scores(), batches(bad=set(range(12))), Right.all(7), "softmax")


def test_only_some_outputs_count():
    """Labels are outputs of the model: images of others are left out, and answers are among those that count."""
    model, kept = Scores(), [1, 2, 5, 6]
    found = figures_of(record_answers(model, batches(), Right.among(kept, 7), "softmax"))
    rows = [n for n, label in enumerate(LABELS) if label in kept]
    scores = model.table[rows][:, kept].detach()
    labels = torch.tensor([kept.index(LABELS[n]) for n in rows])
    assert found.samples == len(rows) == 8 and found.top5 is None
    assert found.top1 == pytest.approx((scores.argmax(1) == labels).float().mean().item())
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(scores, labels).item(), abs=1e-6)


def test_labels_of_the_data_may_stand_for_several_outputs_each():
    """As ObjectNet's classes for ImageNet's: label n has the outputs of group n."""
    model, groups = Scores(), [[6], [0, 4], [2, 1, 3]]
    labels = [0, 1, 2, 2, 1, 0, 2]
    found = figures_of(record_answers(model, batches(labels), Right.numbered(groups), "softmax"))
    outputs = [0, 1, 2, 3, 4, 6]
    scores = model.table[:7].detach()[:, outputs]
    answers = [outputs[best] for best in scores.argmax(1)]
    assert found.top1 == np.mean([answer in groups[label] for answer, label in zip(answers, labels, strict=True)])
    shares = scores.softmax(1)
    joint = [shares[n, [outputs.index(o) for o in groups[label]]].sum().log() for n, label in enumerate(labels)]
    assert found.loss == pytest.approx(-torch.stack(joint).mean().item(), abs=1e-6)


def test_labels_that_the_model_does_not_have_are_refused():
    with pytest.raises(UserError, match=r"sample 'k6' has label 9, outside 0\.\.6: .*--classes"):
        record_answers(Scores(), batches([*LABELS[:6], 9, 1]), Right.all(7), "softmax")
    with pytest.raises(UserError, match="no image has a class that counts"):
        figures_of(record_answers(Scores(), batches([1, 2]), Right.among([3, 4], 7), "softmax"))


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_are_refused(number):
    model = Scores()
    model.table.data[7, 2] = number
    with pytest.raises(UserError, match="the scores of 'k7' are not finite: the model's weights are broken"):
        record_answers(model, batches(), Right.all(7), "softmax")
    assert figures_of(record_answers(model, batches(bad={7}), Right.all(7), "softmax")).samples == 11


def test_real_labels_leave_out_images_without_any():
    record = record_answers(Scores(), batches(bad={1}), Right.all(7), "softmax")
    firsts = dict(zip(record.positions.tolist(), record.ranked[:, 0].tolist(), strict=True))
    lists = [[] for _ in range(12)]
    lists[0], lists[2], lists[3], lists[1] = [firsts[0], 5], [(firsts[2] + 1) % 7], [3, firsts[3]], [4]
    accuracy, count = real_accuracy(record, lists, record.positions)
    assert (accuracy, count) == (2 / 3, 3)  # the image with a bad sample has no answer
    with pytest.raises(UserError, match="no image has a label in --real"):
        real_accuracy(record, [[]] * 12, record.positions)


def test_the_table_says_what_each_class_is_taken_for():
    record = record_answers(Scores(), batches(), Right.all(7), "softmax")
    confusion = Confusion(record.right, record.ranked)
    rows = {row.number: row for row in confusion.table([f"<{n}>" for n in range(7)])}
    answers = record.ranked[:, 0]
    assert sorted(rows) == list(range(7))
    for number, row in rows.items():
        own = [n for n, label in enumerate(LABELS) if label == number]
        wrong = [int(answers[n]) for n in own if answers[n] != number]
        assert (row.name, row.samples) == (f"<{number}>", len(own))
        assert row.top1 == 1 - len(wrong) / len(own)
        assert row.top5 == np.mean([number in record.ranked[n] for n in own])
        assert row.times == max((wrong.count(other) for other in wrong), default=0)
        assert (row.taken_for == "") == (not wrong) and (
            not wrong or wrong.count(int(row.taken_for[1:-1])) == row.times
        )
    mistakes = [(label, int(said)) for label, said in zip(LABELS, answers, strict=True) if label != said]
    assert sorted(confusion.pairs()) == sorted((*pair, mistakes.count(pair)) for pair in set(mistakes))
    times = [count for _, _, count in confusion.pairs()]
    assert times == sorted(times, reverse=True)
    assert sum(row.samples * row.top1 for row in rows.values()) == pytest.approx(12 * figures_of(record).top1)
    lines = confusion.csv(None).splitlines()
    assert lines[0] == "class,name,samples,top1,top5,taken_for,times" and len(lines) == 8
    assert lines[1].startswith("0,class 0,2,")


def test_the_matrix_counts_every_image_once():
    record = record_answers(Scores(), batches(), Right.all(7), "softmax")
    confusion = Confusion(record.right, record.ranked)
    matrix = confusion.matrix()
    assert matrix.sum() == 12 and np.trace(matrix) == round(12 * figures_of(record).top1)
    for truth, said in zip(LABELS, record.ranked[:, 0], strict=True):
        assert matrix[confusion.classes.tolist().index(truth), confusion.classes.tolist().index(said)] > 0


@pytest.mark.parametrize(("classes", "side"), [(5, 360), (40, 960 + 48), (2500, 960 + 48)])
def test_the_picture_has_its_weight_on_the_diagonal_of_a_good_model(classes, side):
    right = np.arange(classes)[:, None]
    record = record_answers(Scores(), batches(), Right.all(7), "softmax")._replace(right=right, ranked=right)
    picture = Confusion(record.right, record.ranked).picture([f"a class with a long name {n}" for n in range(classes)])
    assert picture.width == picture.height and picture.width >= side * 0.9
    pixels = np.asarray(picture.convert("L")).astype(int)
    dark = np.argwhere(pixels < 100)
    if classes > 30:
        assert len(dark) and np.abs(dark[:, 0] - dark[:, 1]).max() <= 24  # within one cell
