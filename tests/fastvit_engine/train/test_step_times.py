import time

import torch

from fastvit_engine.train.step_times import PARTS, StepTimes


def test_the_seconds_of_each_part_are_added_up_until_they_are_taken() -> None:
    times = StepTimes(torch.device("cpu"))
    for _ in range(2):
        with times.of("forward"):
            time.sleep(0.02)
    with times.of("update"):
        time.sleep(0.01)
    taken = times.take()
    assert tuple(taken) == PARTS
    assert taken["forward"] >= 0.04 and taken["update"] >= 0.01 and taken["backward"] == 0
    assert set(times.take().values()) == {0.0}


def test_what_is_cleared_does_not_count() -> None:
    times = StepTimes(torch.device("cpu"))
    with times.of("backward"):
        time.sleep(0.01)
    times.clear()
    assert set(times.take().values()) == {0.0}


class Event:
    """Stands for an event of a GPU, whose clock advances by 1,500 ms at each one that is recorded."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.clock += 1500
        self.at = Event.clock

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


def test_on_a_gpu_events_are_recorded_and_read_when_the_sums_are_taken(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    times = StepTimes(torch.device("cuda", 0))
    for part in ("forward", "backward", "forward"):
        with times.of(part):
            pass
    assert times.take() == {"forward": 3.0, "backward": 1.5, "update": 0.0}
    assert set(times.take().values()) == {0.0}
