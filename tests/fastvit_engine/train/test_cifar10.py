"""The recipe for CIFAR-10 on a CPU, on the real photos, where a copy of them lies beside the checkout."""

from pathlib import Path

import pytest

from fastvit_engine.observe.metrics import read_metrics
from tests.fastvit_engine.warm_ranks import run_ranks
from tests.in_full import only_in_full

CIFAR10 = Path(__file__).parents[4] / "shared" / "data" / "cifar10"

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    only_in_full,
    pytest.mark.skipif(not CIFAR10.is_dir(), reason="no CIFAR-10 shards in ../shared/data/cifar10"),
]


def test_200_steps_lower_the_loss_and_raise_the_accuracy(tmp_path):
    run = tmp_path / "run"
    settings = [f"data.train={CIFAR10}/train-*.tar.gz", f"data.eval={CIFAR10}/test-000000.tar.gz"]
    settings += ["train.duration=200 steps", "train.log_every=5", "evaluate.every=50%"]
    arguments = ["train", "cifar10_cpu", "--out", str(run)]
    arguments += [word for setting in settings for word in ("--set", setting)]
    assert run_ranks(arguments, 2, tmp_path / "log"), (tmp_path / "log").read_text()
    training, evaluations = read_metrics(run / "metrics.jsonl")
    losses = [row["loss"] for row in training]
    assert training[-1]["step"] == 200
    assert sum(losses[-5:]) / 5 < 2.0 < 2.2 < losses[0]
    accuracies = [row["top1"] for row in evaluations]
    assert [row["samples"] for row in evaluations] == [5_000] * 2
    assert accuracies[-1] > accuracies[0]
    assert accuracies[-1] > 0.28  # chance is 0.1
