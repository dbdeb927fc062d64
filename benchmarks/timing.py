"""Time of the device: what a GPU takes from the first kernel of a call to the last, or a CPU from call to return.

All providers of a case take turns, in an order that rotates from round to round, so that a slow moment of the machine
hits all of them. Before each timed region a buffer larger than the cache is read, so that nobody finds his inputs
there, and a GPU is kept busy until the host has queued the whole call: otherwise short kernels would be timed by how
fast Python launches them. What the host takes is noted beside it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import Bound, Outputs

CPU_CACHE_BYTES = 4 << 20  # a core's own; the last level is shared, and too large to be swept each time
SLEEP_CYCLES = 2_000_000  # of one calibration
MARGIN = 2.0  # by how much longer than the host needs a GPU is kept busy
LONGEST_HOLD = 0.05  # seconds; what takes the host longer was compiling


class Clock:
    """Marks moments on a device, in the order of its work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        cache = torch.cuda.get_device_properties(device).L2_cache_size if self.on_gpu else CPU_CACHE_BYTES
        self._sweep = torch.rand(max(4 * cache, 1 << 24) // 4, device=device)
        self._cycles_per_second = self._calibrate() if self.on_gpu else 0.0

    def cool(self) -> None:
        """Reads more than the cache holds; reading, because written lines would have to leave the cache later."""
        self._sweep.sum()

    def hold(self, seconds: float) -> None:
        """Keeps a GPU busy for so long, so that what is queued meanwhile runs without gaps."""
        if self.on_gpu:
            torch.cuda._sleep(int(min(MARGIN * seconds, LONGEST_HOLD) * self._cycles_per_second) + 1)

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _calibrate(self) -> float:
        for _ in range(2):  # the first time loads the kernel
            start = self.mark()
            torch.cuda._sleep(SLEEP_CYCLES)
            end = self.mark()
            self.wait()
        return SLEEP_CYCLES / (1e-3 * self.milliseconds(start, end))


@dataclass
class Racer:
    """A provider of a case with several sets of inputs, which take turns."""

    sets: Sequence[Bound]
    cotangents: Sequence[Tensor]  # one an output
    turns: int = 0
    host_seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "backward": 0.0})

    def turn(self, clock: Clock) -> dict[str, tuple[Any, Any]]:
        """One call and, if there are leaves, its gradients: the moments around each pass."""
        bound = self.sets[self.turns % len(self.sets)]
        self.turns += 1
        bound.before()
        outputs, forward = self._timed(clock, "forward", bound.forward)
        moments = {"forward": forward}
        if bound.leaves:
            leaves = list(bound.leaves.values())
            _, moments["backward"] = self._timed(
                clock, "backward", lambda: torch.autograd.grad(outputs, leaves, self.cotangents)
            )
        return moments

    def _timed(self, clock: Clock, name: str, call: Any) -> tuple[Outputs, tuple[Any, Any]]:
        clock.cool()
        clock.hold(self.host_seconds[name])
        start, host = clock.mark(), time.perf_counter()
        result = call()
        self.host_seconds[name] = time.perf_counter() - host
        return result, (start, clock.mark())


@dataclass(frozen=True)
class Times:
    """Milliseconds in each round, by pass; of the host, by pass, in the last round."""

    device: Mapping[str, list[float]]
    host: Mapping[str, float]


def race(
    racers: Mapping[str, Racer], clock: Clock, *, rounds: int, seconds: float, warmup: int = 2
) -> dict[str, Times]:
    """Times every provider once per round, after `warmup` rounds; ends after `seconds`, but not before round 3."""
    names = list(racers)
    times: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    start = time.monotonic()
    for round_ in range(-warmup, rounds):
        if round_ >= 3 and time.monotonic() - start > seconds:
            break
        first = round_ % len(names)
        moments = {name: racers[name].turn(clock) for name in names[first:] + names[:first]}
        clock.wait()
        if round_ < 0:
            continue
        for name, of_passes in moments.items():
            taken = {key: clock.milliseconds(*pair) for key, pair in of_passes.items()}
            if len(taken) > 1:
                taken["both"] = sum(taken.values())
            for key, milliseconds in taken.items():
                times[name].setdefault(key, []).append(milliseconds)
    return {name: Times(times[name], dict(racers[name].host_seconds)) for name in names}


def device_timer() -> float:
    """Seconds by the host's clock once the GPU has caught up: for `pytest --benchmark-timer`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
