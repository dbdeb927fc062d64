"""The moving average of the weights: what it is after some steps, and what it is exchanged with."""

import pytest
import torch

from fastvit_engine.engine.ema import WeightAverage
from tests.fastvit_engine.plain_engine import PlainEngine


class CountingEngine(PlainEngine):
    """Counts how often weights that were written are published to the model."""

    published = 0

    def publish(self):
        self.published += 1


@pytest.fixture
def engine():
    torch.manual_seed(0)
    return CountingEngine(torch.nn.Linear(3, 2))


def weights(engine):
    return torch.cat([part.values for part in engine.master_weights()]).clone()


def average(ema):
    return torch.cat([part.values for part in ema.slices()]).clone()


def set_weights(engine, value):
    for part in engine.master_weights():
        part.values.fill_(value)


def test_the_average_begins_as_the_first_weights(engine):
    ema = WeightAverage(engine, 0.9)
    first = weights(engine)
    set_weights(engine, 7.0)
    assert torch.equal(average(ema), first)


def test_the_decay_of_a_teacher_rises_to_one(engine):
    ema = WeightAverage(engine, 0.9, rises_over=4)
    assert [ema.decay_at(step) for step in (0, 2, 4, 9)] == pytest.approx([0.9, 0.95, 1.0, 1.0])
    assert ema.decay_at(1) == pytest.approx(1 - 0.1 * (1 + 0.5**0.5) / 2)


def test_each_update_keeps_the_share_of_the_ramp_and_then_that_of_the_decay(engine):
    set_weights(engine, 0.0)
    ema = WeightAverage(engine, 0.9)
    expected = 0.0
    for step, kept in enumerate([1 / 10, 2 / 11, 3 / 12, 4 / 13]):  # (1 + t) / (10 + t)
        set_weights(engine, value := step + 1.0)
        ema.update(step)
        expected = kept * expected + (1 - kept) * value
        torch.testing.assert_close(average(ema), torch.full((8,), expected))
    for step, kept in ((80, 81 / 90), (81, 0.9), (82, 0.9), (10**6, 0.9)):  # the ramp reaches 0.9 at step 80
        set_weights(engine, 100.0)
        ema.update(step)
        expected = kept * expected + (1 - kept) * 100
        torch.testing.assert_close(average(ema), torch.full((8,), expected))


def test_a_decay_below_the_ramp_holds_from_the_first_step(engine):
    set_weights(engine, 0.0)
    ema = WeightAverage(engine, 0.05)
    set_weights(engine, 1.0)
    ema.update(0)
    torch.testing.assert_close(average(ema), torch.full((8,), 0.95))


def test_the_model_computes_with_the_average_inside_the_block_only_also_after_an_error(engine):
    ema = WeightAverage(engine, 0.5)
    first = weights(engine)
    set_weights(engine, 2.0)
    with ema.applied():
        assert torch.equal(weights(engine), first) and torch.equal(average(ema), torch.full((8,), 2.0))
        assert engine.published == 1
    assert torch.equal(average(ema), first) and engine.published == 2
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert torch.equal(weights(engine), torch.full((8,), 2.0)) and torch.equal(average(ema), first)
    assert engine.published == 4


def test_slices_are_the_average_itself_and_a_restart_takes_the_weights(engine):
    ema = WeightAverage(engine, 0.5)
    for part, master in zip(ema.slices(), engine.master_weights(), strict=True):
        assert (part.name, part.start, part.stop) == (master.name, master.start, master.stop)
        part.values.fill_(5.0)
    assert torch.equal(average(ema), torch.full((8,), 5.0))
    ema.restart()
    assert torch.equal(average(ema), weights(engine))
