import torch

from benchmarks.registry import Bound
from benchmarks.timing import Clock, Racer, race


class Hand(Clock):
    """A clock that its tests move."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.now, self.swept = 0.0, 0

    def cool(self):
        self.swept += 1

    def mark(self):
        return self.now


def test_everybody_has_a_turn_a_round_in_an_order_that_rotates():
    clock, order = Hand(), []

    def racer(name, milliseconds):
        x = torch.ones(2, requires_grad=True)

        def forward():
            order.append(name)
            clock.now += 1e-3 * milliseconds
            return (2 * x,)

        return Racer([Bound(forward, {"x": x})], [torch.ones(2)])

    times = race({"a": racer("a", 1), "b": racer("b", 2), "c": racer("c", 4)}, clock, rounds=3, seconds=60, warmup=0)
    assert order == list("abcbcacab")
    assert [round(value, 6) for value in times["c"].device["forward"]] == [4, 4, 4]
    assert times["c"].device["both"] == [
        sum(pair) for pair in zip(times["c"].device["forward"], times["c"].device["backward"], strict=True)
    ]
    assert clock.swept == 3 * 3 * 2  # before each pass of each turn


def test_sets_of_inputs_take_turns_and_are_put_right_off_the_clock():
    clock, log = Hand(), []

    def bound(name):
        def before():
            log.append(f"before {name}")
            clock.now += 100

        return Bound(lambda: log.append(name) or (torch.ones(1),), {}, before)

    times = race({"a": Racer([bound("x"), bound("y")], [])}, clock, rounds=3, seconds=60, warmup=0)
    assert log == ["before x", "x", "before y", "y", "before x", "x"]
    assert times["a"].device == {"forward": [0.0, 0.0, 0.0]}


def test_time_that_is_up_ends_the_race_after_three_rounds():
    racer = Racer([Bound(lambda: (torch.ones(1),), {})], [])
    times = race({"a": racer}, Hand(), rounds=50, seconds=0, warmup=2)
    assert len(times["a"].device["forward"]) == 3 and racer.turns == 5
