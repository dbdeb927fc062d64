from dataclasses import asdict

import numpy as np
import pytest
import torch

from fastvit_engine.data import Batch
from fastvit_engine.distributed.world import World
from fastvit_engine.evaluate.classification import Classification, evaluate
from fastvit_engine.evaluate.protocol import Evaluator
from fastvit_kernels import FusedCrossEntropy


class Alone(World):
    """One process, without a process group."""

    def sum(self, values):
        return torch.as_tensor(values)

    def gather(self, value):
        return [value]


WORLD = Alone(rank=0, size=1, device=torch.device("cpu"))


class Ranking(torch.nn.Module):
    """Says class n most strongly, then n + 1, and so on, of an image whose pixels are all n."""

    def forward(self, images):
        first = images[:, 0, 0, 0].long()[:, None]
        return -((torch.arange(7) - first) % 7).float()


def _batch(first, labels, weights):
    images = torch.tensor(first, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 2, 3).contiguous()
    return Batch(images, torch.tensor(labels), torch.tensor(weights), [str(n) for n in first], np.zeros(len(first)))


def test_padding_does_not_count():
    batches = [_batch([0, 1, 2], [0, 3, 1], [1.0, 1.0, 1.0]), _batch([4, 0], [4, 0], [1.0, 0.0])]
    accuracy, answers = evaluate(Ranking(), batches, FusedCrossEntropy("softmax"), WORLD, shown=3)
    shown = answers.examples
    assert answers.right.tolist() == [[0], [3], [1], [4]] and answers.ranked[:, 0].tolist() == [0, 1, 2, 4]
    assert accuracy.samples == 4 and accuracy.top1 == 2 / 4 and accuracy.top5 == 3 / 4  # the third comes sixth
    assert [example["key"] for example in shown] == ["0", "1", "2"] and shown[1]["label"] == 3
    assert [index for index, _ in shown[1]["predictions"]] == [1, 2, 3, 4, 5]
    ranks = torch.tensor([0, 2, 6, 0])  # of the four right labels: the padding of the second batch would lower the mean
    losses = ranks + torch.logsumexp(-torch.arange(7.0), dim=0)
    assert accuracy.loss == pytest.approx(losses.mean().item())


def test_any_of_several_labels_is_right():
    batch = _batch([0, 1, 2], [[5, 0], [1, -1], [1, 0]], [1.0, 1.0, 1.0])
    accuracy, _ = evaluate(Ranking(), [batch], FusedCrossEntropy("sigmoid"), WORLD)
    assert accuracy.top1 == pytest.approx(2 / 3) and accuracy.top5 == pytest.approx(2 / 3)
    logits, hot = Ranking()(batch.images), torch.zeros(3, 7)
    for row, column in ((0, 5), (0, 0), (1, 1), (2, 1), (2, 0)):
        hot[row, column] = 1
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, hot, reduction="none").sum(dim=1)
    assert accuracy.loss == pytest.approx(losses.mean().item())


def test_the_answers_of_all_processes_are_put_together():
    class Two(Alone):
        """The other process has the same images."""

        def gather(self, value):
            assert value.examples == []  # which stay where they are
            return [value, value]

    found = []
    batch = _batch([0, 1, 2], [[5, 0], [1, -1], [1, 0]], [1.0, 0.0, 1.0])
    evaluator = Classification(
        lambda: [batch],
        FusedCrossEntropy("sigmoid"),
        Two(rank=0, size=2, device=torch.device("cpu")),
        every_steps=5,
        shown=1,
        on_answers=lambda step, name, answers: found.append(answers),
    )
    evaluator.run(Ranking(), step=1, name="eval")
    assert found[0].right.tolist() == [[5, 0], [1, 0]] * 2 and found[0].ranked[:, 0].tolist() == [0, 2] * 2
    assert [example["key"] for example in found[0].examples] == ["0"]


def test_the_evaluator_writes_a_row_and_shows_its_examples():
    passes, shown = [], []

    def batches():
        passes.append(1)
        return [_batch([0, 1, 2], [0, 3, 1], [1.0, 1.0, 1.0])]

    def show(step, name, answers):
        shown.append((step, name, [example["key"] for example in answers.examples]))

    evaluator: Evaluator = Classification(
        batches, FusedCrossEntropy("softmax"), WORLD, every_steps=5, shown=2, on_answers=show
    )
    model = Ranking().train()
    (row,) = evaluator.run(model, step=10, name="eval_ema")
    expected, _ = evaluate(model, batches(), FusedCrossEntropy("softmax"), WORLD)
    assert row.pop("seconds") >= 0
    assert row == {"step": 10, "eval": "eval_ema", **asdict(expected)}
    assert shown == [(10, "eval_ema", ["0", "1"])]
    evaluator.run(model, step=15, name="eval")
    assert len(passes) == 3  # each run is a pass of its own
    assert model.training and (evaluator.name, evaluator.every_steps) == ("eval", 5)


class Dropping(Ranking):
    """Leaves out most of what it says while it trains."""

    def forward(self, images):
        return torch.nn.functional.dropout(super().forward(images), 0.9, self.training)


def test_nothing_that_is_random_in_training_is_active():
    batch, criterion = _batch([0, 1, 2, 3], [0, 3, 1, 3], [1.0] * 4), FusedCrossEntropy("softmax")
    training = Dropping().train()
    assert evaluate(training, [batch], criterion, WORLD)[0] == evaluate(Ranking(), [batch], criterion, WORLD)[0]
    assert training.training


def test_without_a_world_it_is_this_process_alone():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 7))
    batch = _batch([0, 1], [0, 3], [1.0, 1.0])._replace(images=torch.ones(2, 2, 2, 3))
    alone, _ = evaluate(model, [batch], FusedCrossEntropy("softmax"))
    assert alone == evaluate(model, [batch], FusedCrossEntropy("softmax"), WORLD)[0]
    assert alone.samples == 2
