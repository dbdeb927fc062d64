import pytest
import torch

from fastvit_engine.config import WatchdogConfig
from fastvit_engine.distributed.stragglers import Stragglers
from fastvit_engine.distributed.world import World
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.run_folder import RunFolder


class FakeWorld(World):
    """Rank 0 of several, the others of which have done the given seconds of work."""

    others: list[float]

    def sum(self, values):
        return torch.tensor([values[0], *self.others], dtype=torch.float64)


@pytest.fixture
def stragglers(tmp_path):
    world = FakeWorld(rank=0, size=4, device=torch.device("cpu"))
    return Stragglers(RunFolder(tmp_path), world, WatchdogConfig(), ["a", "a", "b", "b"], zero_stage=1)


class Messages:
    def __init__(self):
        self.texts = []

    def message(self, text):
        self.texts.append(text)


def laps(stragglers, count, own, others, seconds=10.0):
    """The messages at `count` log steps, each after `seconds`."""
    object.__setattr__(stragglers.world, "others", others)
    recorder = Messages()
    for step in range(count):
        stragglers.log_step(own / 2, own / 2, seconds, step, recorder)
    return recorder.texts


def test_a_rank_that_stays_slow_is_named_once_in_thirty_laps(stragglers):
    laps(stragglers, 1, 9.0, [1.0, 1.0, 1.0])  # the first log step does not count
    assert laps(stragglers, 2, 1.0, [1.0, 1.0, 2.0]) == []
    assert laps(stragglers, 1, 1.0, [1.0, 1.0, 2.0]) == [
        "rank 3 on b is slow: its data and forward pass took 2.0 times as long as the median rank's"
    ]
    assert laps(stragglers, 29, 1.0, [1.0, 1.0, 2.0]) == []
    assert len(laps(stragglers, 1, 1.0, [1.0, 1.0, 2.0])) == 1
    event = read_events(stragglers.run)[0]
    assert (event["event"], event["ranks"], event["ratio"]) == ("slow_rank", [3], 2.0)


@pytest.mark.parametrize(
    ("own", "others"),
    [
        (1.0, [1.0, 1.0, 1.4]),  # below the ratio
        (0.01, [0.01, 0.01, 0.1]),  # costs the others 1 % of the time
        (3.0, [3.0, 3.0, 3.0]),  # all alike
    ],
)
def test_what_does_not_count(stragglers, own, others):
    assert laps(stragglers, 9, own, others) == []


def test_a_rank_with_more_images_may_take_longer(tmp_path):
    """At most in proportion: 2 images instead of 1 may take from as long to twice as long."""

    def slow(own, others):
        world = FakeWorld(rank=0, size=4, device=torch.device("cpu"))
        given = {"zero_stage": 1, "images": [2, 1, 1, 1]}
        return laps(Stragglers(RunFolder(tmp_path), world, WatchdogConfig(), list("abcd"), **given), 9, own, others)

    assert slow(2.0, [1.0, 1.0, 1.0]) == slow(2.9, [1.0, 1.0, 1.0]) == slow(1.0, [1.0, 1.0, 1.0]) == []
    assert "rank 0 on a is slow" in slow(3.1, [1.0, 1.0, 1.0])[0]
    assert "rank 2 on c is slow" in slow(2.0, [1.0, 1.6, 1.0])[0]  # it has no more to do than the others


def test_a_rank_that_was_fast_in_between_is_not_named(stragglers):
    laps(stragglers, 1, 1.0, [1.0, 1.0, 1.0])
    for _ in range(3):
        assert laps(stragglers, 2, 1.0, [1.0, 1.0, 2.0]) == []
        assert laps(stragglers, 1, 1.0, [1.0, 1.0, 1.0]) == []


def test_frequent_log_steps_are_taken_together(stragglers):
    """Chance makes another rank slow at each log step, and none over five seconds."""
    laps(stragglers, 1, 0.1, [0.1, 0.1, 0.1])
    for step in range(100):
        others = [0.1, 0.1, 0.1]
        others[step % 3] = 0.4
        assert laps(stragglers, 1, 0.1, others, seconds=0.5) == []


@pytest.mark.parametrize(("stage", "named"), [(2, True), (3, False)])
def test_the_forward_pass_counts_unless_it_waits_for_other_ranks(tmp_path, stage, named):
    world = FakeWorld(rank=0, size=2, device=torch.device("cpu"))
    object.__setattr__(world, "others", [1.0])
    stragglers = Stragglers(RunFolder(tmp_path), world, WatchdogConfig(), ["a", "a"], zero_stage=stage)
    recorder = Messages()
    for step in range(9):
        stragglers.log_step(0.5, 2.0, 10.0, step, recorder)
    assert any("rank 0 on a is slow" in text for text in recorder.texts) == named
