"""What the evaluations of a run measure: with which batches, which loss, and which weights."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastvit_engine.config import Config
from fastvit_engine.data import Batch
from fastvit_engine.data.stream.batch import BadSample
from fastvit_engine.distributed.world import World
from fastvit_engine.objectives import mae_targets
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.evaluators import build_evaluators, run_evaluators

IMAGES = torch.randint(0, 256, (6, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


class Alone(World):
    """Rank 1 of 2, whose peer has nothing to add."""

    def sum(self, values):
        return torch.as_tensor(values)

    def gather(self, value):
        return [value]

    def on_main(self, function):
        return function()


class Data:
    """Six images, one of which is bad."""

    class_names = ("a", "b", "c")

    def __init__(self):
        self.asked = []

    def eval_batches(self, config, **asked):
        self.asked.append(asked)
        bad = (BadSample("5", "eval-0.tar", "has no image"),)
        keys = [str(number) for number in range(6)]
        yield Batch(IMAGES, LABELS, torch.tensor([1.0] * 5 + [0.0]), keys, np.zeros(6), bad)


class Model(torch.nn.Module):
    """Logits are a bias and the mean of each colour."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(3))

    def forward(self, images):
        return images.float().mean(dim=(1, 2)) / 64 + self.bias


class Average:
    """Of the weights: while it is applied, the bias is another."""

    def __init__(self, model):
        self.model = model

    @contextmanager
    def applied(self):
        self.model.bias.data += torch.tensor([9.0, 0.0, 0.0])
        yield
        self.model.bias.data -= torch.tensor([9.0, 0.0, 0.0])


@pytest.fixture
def job(tmp_path):
    """job(**sections) -> what evaluators use of a job"""

    def make(rank=1, average=False, **sections):
        model = Model()
        return SimpleNamespace(
            config=Config.model_validate({"data": {"eval": "eval-*.tar"}, **sections}),
            world=Alone(rank, 2, torch.device("cpu")),
            run=RunFolder(tmp_path),
            split=SimpleNamespace(micro_batch_size=7),
            schedule=SimpleNamespace(evaluate_every=30, own_every=10),
            evaluators={},
            processes=SimpleNamespace(watchdog=SimpleNamespace(marked=lambda items, phase: items)),
            engine=SimpleNamespace(model=model),
            ema=Average(model) if average else None,
        )

    return make


def measure(job, data=None, step=30):
    evaluators = build_evaluators(job, data or Data(), None, None)
    assert [evaluator.every_steps for evaluator in evaluators] == [30]
    return run_evaluators(evaluators, job, step, None)


def test_without_evaluation_data_nothing_is_measured(job):
    assert build_evaluators(job(data={"eval": None}), Data(), None, None) == []


@pytest.mark.parametrize(("given", "batch_size"), [(None, 7), (5, 5)])
def test_batches_are_those_of_this_rank_in_the_size_that_is_set_or_that_of_training(job, given, batch_size):
    data = Data()
    measure(job(evaluate={"batch_size": given}), data)
    assert data.asked == [{"rank": 1, "world_size": 2, "batch_size": batch_size, "pin_memory": False}]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_loss_is_of_the_kind_that_is_trained_and_not_smoothed(job, kind):
    figures = measure(job(loss={"kind": kind, "label_smoothing": 0.1}))
    logits = Model()(IMAGES[:5])
    hot = torch.nn.functional.one_hot(LABELS[:5], 3).float()
    expected = {
        "softmax": torch.nn.functional.cross_entropy(logits, LABELS[:5]),
        "sigmoid": torch.nn.functional.binary_cross_entropy_with_logits(logits, hot, reduction="none").sum(1).mean(),
    }[kind]
    assert figures["eval"]["loss"] == pytest.approx(expected.item())
    assert figures["eval"]["samples"] == 5


def test_the_average_of_the_weights_is_measured_too_with_its_own_weights(job):
    figures = measure(job(average=True))
    assert figures.keys() == {"eval", "eval_ema"}
    logits = Model()(IMAGES[:5])
    right = (logits.argmax(1) == LABELS[:5]).float().mean().item()
    assert figures["eval"]["top1"] == pytest.approx(right)
    assert figures["eval_ema"]["top1"] == pytest.approx(2 / 5)  # it says class 0 of all
    assert measure(job()).keys() == {"eval"}


def test_an_evaluator_that_train_was_given_measures_the_weights_and_their_average(job):
    running = job(average=True, data={"eval": None})
    running.evaluators["bias"] = lambda model: {"first": model.bias[0], "sum": model.bias.sum()}
    (evaluator,) = build_evaluators(running, Data(), None, None)
    assert evaluator.every_steps == 10
    rows = []
    recorder = SimpleNamespace(evaluation=rows.append)
    assert run_evaluators([evaluator], running, 20, recorder) == {}  # it says nothing of accuracy
    assert [(row["step"], row["eval"], row["figures"]) for row in rows] == [
        (20, "bias", {"first": 0.0, "sum": 0.0}),
        (20, "bias_ema", {"first": 9.0, "sum": 9.0}),
    ]


def test_bad_samples_are_counted_and_named(job):
    running = job()
    measure(running)
    (line,) = running.run.bad_samples.read_text().splitlines()
    assert json.loads(line)["key"] == "5"


def test_rank_0_writes_down_examples_for_the_report(job):
    for rank in (1, 0):
        running = job(rank)
        assert not running.run.samples.exists()
        measure(running)
    shown = json.loads(running.run.samples.read_text())
    assert (shown["step"], shown["class_names"]) == (30, ["a", "b", "c"])
    assert [sample["key"] for sample in shown["samples"]] == ["0", "1", "2", "3", "4"]


def test_rank_0_writes_down_how_well_each_class_is_recognised(job):
    for rank in (1, 0):
        running = job(rank, average=True)
        assert not running.run.classes.exists()
        measure(running)
    found = json.loads(running.run.classes.read_text())
    assert (found["step"], found["eval"], found["class_names"]) == (30, "eval_ema", ["a", "b", "c"])
    # The average says class 0 of all; the sixth image is bad.
    assert found["classes"] == [[0, 2, 2], [1, 2, 0], [2, 1, 0]] and found["confused"] == [[1, 0, 2], [2, 0, 1]]


def test_without_labels_the_loss_is_measured_on_images_with_the_same_patches_hidden(job):
    """Of images as they are, whatever augmentation training has; accuracy is not known."""
    model = {"name": "Ti/2", "image_size": 4, "num_classes": 0}
    running = job(model=model, train={"objective": "mae"}, augment={"randaugment_ops": 2}, data={"eval": "eval-*.tar"})
    seen = []

    class Predictor(Model):
        def forward(self, images, visible, masked):
            seen.append((images, masked))
            return torch.zeros(len(images), masked.shape[1], 12)

    running.engine.model = Predictor()
    figures, again = measure(running), measure(running)
    images, masked = seen[0]
    assert figures == again and all(torch.equal(hidden, masked) for _, hidden in seen)
    assert torch.equal(images, IMAGES)
    targets = mae_targets(IMAGES.permute(0, 3, 1, 2) / 127.5 - 1, 2)[torch.arange(6)[:, None], masked]
    expected = targets[:5].square().mean().item()  # the sixth is bad
    assert figures == {"eval": {"top1": None, "top5": None, "loss": pytest.approx(expected, rel=1e-4), "samples": 5}}
    assert running.engine.model.training
