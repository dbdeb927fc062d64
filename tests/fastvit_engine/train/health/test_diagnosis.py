import math

import numpy as np
import pytest
import torch
from torch import nn

from fastvit_engine.data import Batch
from fastvit_engine.train.health.diagnosis import GradientWatch, Trace, diagnose
from fastvit_engine.train.health.guard import Anomaly, StepReport
from tests.fastvit_engine.plain_engine import PlainEngine
from tests.fastvit_engine.ranks import on_ranks

FAULT = Anomaly("gradient", "the gradients are not finite")
LOUD = Anomaly("loss spike", "the loss is 40", limit=5.0)


def step(model, watch, inputs, spoil):
    """A backward pass; `spoil` makes the gradient of the second bias infinite."""
    model.zero_grad()
    watch.clear()
    if spoil:
        hook = model[1].bias.register_hook(lambda gradient: gradient * math.inf)
        if watch.on:  # after ours, as hardware is before anybody who looks
            watch.stop()
            watch.start()
    model(inputs).sum().backward()
    if spoil:
        hook.remove()


def diagnosed(anomaly, losses, *, spoilt=(), times=1, watched=False, weight=None, padding=()):
    """The diagnosis, and whether gradients are watched after it.

    `losses`: of each rank's samples, of which those at the places `padding` are none. `spoilt`: ranks whose gradient is
    infinite the first `times` times.
    """

    def of_rank(world):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        if weight == world.rank:
            model[0].weight.data[1, 1] = math.nan
        if weight == "all":
            for parameter in model.parameters():
                parameter.data.fill_(math.inf)
        engine = PlainEngine(model)
        watch = GradientWatch(engine, world.device)
        if watched:
            watch.start()
        own = torch.tensor(losses[world.rank])
        keys = ["" if number in padding else f"{world.rank}-{number}" for number in range(len(own))]
        batch = Batch(torch.zeros(len(own), 4), torch.zeros(1), torch.ones(1), keys, np.zeros(1))
        step(model, watch, batch.images, world.rank in spoilt)

        def rehearse():
            again = times > 1
            step(model, watch, batch.images, again and world.rank in spoilt)
            spiked = anomaly.kind == "loss spike"
            return StepReport(2.0, 1.0, 0.0, anomaly if again or spiked else None)

        return diagnose(anomaly, Trace([batch], [own]), rehearse, engine, watch, world), watch.on

    found = on_ranks(len(losses), of_rank)
    assert all(other == found[0] for other in found)
    return found[0]


def test_the_sample_whose_loss_is_not_finite_is_named():
    diagnosis, _ = diagnosed(Anomaly("loss", "the loss is nan"), [[1.0, 2.0], [1.0, math.nan], [1.0, 1.0]], times=2)
    assert (diagnosis.ranks, diagnosis.keys, diagnosis.repeats) == ([1], ["1-1"], True)
    assert diagnosis.cause.startswith("data or numerics")


def test_padding_is_never_at_fault():
    nan = math.nan
    broken, _ = diagnosed(Anomaly("loss", "the loss is nan"), [[1.0, 1.0], [nan, nan]], times=2, padding=[1])
    assert (broken.ranks, broken.keys) == ([1], ["1-0"])
    unknown, _ = diagnosed(FAULT, [[1.0, 1.0], [1.0, 1.0]], spoilt=[1], padding=[1])
    assert unknown.keys == ["0-0", "1-0"]


@pytest.mark.parametrize("watched", [False, True])
def test_a_fault_that_repeats_is_seen_in_the_repetition(watched):
    diagnosis, watches = diagnosed(FAULT, [[1.0, 1.0]] * 3, spoilt=[2], times=2, watched=watched)
    assert (diagnosis.ranks, diagnosis.keys, diagnosis.parameters) == ([2], ["2-0", "2-1"], ["1.bias"])
    assert diagnosis.repeats
    assert watches == watched


def test_a_watched_fault_that_does_not_repeat_is_the_hardwares():
    diagnosis, _ = diagnosed(FAULT, [[1.0]] * 3, spoilt=[1], watched=True)
    assert (diagnosis.ranks, diagnosis.parameters, diagnosis.repeats) == ([1], ["1.bias"], False)
    assert diagnosis.cause.startswith("hardware suspected")
    assert diagnosis.at.startswith(" on rank 1 (")


def test_after_a_fault_that_nobody_saw_gradients_are_watched():
    diagnosis, watches = diagnosed(FAULT, [[1.0]] * 3, spoilt=[1])
    assert (diagnosis.ranks, diagnosis.repeats) == ([], False)
    assert diagnosis.keys == ["0-0", "1-0", "2-0"]
    assert watches


def test_the_micro_batch_that_spikes_is_named_and_all_where_the_sum_does():
    alone, _ = diagnosed(LOUD, [[1.0, 1.0], [200.0, 1.0]])
    assert (alone.ranks, alone.keys) == ([1], ["1-0", "1-1"])
    together, _ = diagnosed(LOUD, [[30.0], [50.0]])
    assert (together.ranks, together.keys) == ([], ["0-0", "1-0"])


def test_broken_weights_are_named_and_the_step_is_not_repeated():
    diagnosis, _ = diagnosed(Anomaly("loss", "the loss is nan"), [[math.nan], [1.0]], weight=0)
    assert (diagnosis.ranks, diagnosis.parameters, diagnosis.repeats) == ([0], ["0.weight"], None)
    assert diagnosis.in_weights
    assert not diagnosis.everywhere


def test_a_loss_that_is_not_finite_for_every_sample_is_no_samples_fault():
    anomaly = Anomaly("loss", "the loss is nan")
    everywhere, _ = diagnosed(anomaly, [[math.nan, math.inf], [math.nan, math.nan]], times=2)
    assert everywhere.everywhere and everywhere.cause.startswith("numerics") and everywhere.at == ""
    some, _ = diagnosed(anomaly, [[math.nan, 1.0], [math.nan, math.nan]], times=2)
    assert not some.everywhere
    gone, _ = diagnosed(anomaly, [[math.nan], [math.nan]], times=1)
    assert not gone.everywhere and gone.cause.startswith("hardware suspected")


def test_gradients_that_are_not_finite_on_every_process_are_no_hosts_fault():
    everywhere, _ = diagnosed(FAULT, [[1.0], [1.0]], spoilt=[0, 1], times=2)
    assert everywhere.everywhere and everywhere.parameters == ["1.bias"]
    one, _ = diagnosed(FAULT, [[1.0], [1.0]], spoilt=[0], times=2)
    assert not one.everywhere


def test_weights_that_are_not_finite_in_every_copy_are_no_hosts_fault():
    anomaly = Anomaly("loss", "the loss is nan")
    diverged, _ = diagnosed(anomaly, [[math.nan], [math.nan]], weight="all")
    assert (diverged.everywhere, diverged.parameters) == (True, ["0.bias", "0.weight", "1.bias", "1.weight"])
    assert diverged.remedy(updated=True).startswith("lower optimizer.learning_rate")
