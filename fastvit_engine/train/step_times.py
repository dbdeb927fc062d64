"""How long the parts of a training step take: forward, backward, update."""

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch

PARTS = ("forward", "backward", "update")


class StepTimes:
    """Adds up the seconds of each part of the steps since the last `take`.

    On a GPU, events in its stream mark the parts: nothing waits for them until the sums are taken.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.clear()

    def clear(self) -> None:
        """Forgets what has been timed."""
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def of(self, part: str) -> Generator[None]:
        """Times a block that belongs to one of `PARTS`."""
        if self._on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((part, start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """The seconds of each part since the last `take`. The device must be idle."""
        seconds = dict(self._seconds)
        for part, start, end in self._events:
            seconds[part] += start.elapsed_time(end) / 1000
        self.clear()
        return seconds
