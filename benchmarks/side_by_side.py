"""Training steps of several variants in one process, which take every step in turn: so clocks and heat are the same.

All variants start from the same weights and see the same batches: noise around a picture of each class, which can be
learned.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.registry import Unusable
from benchmarks.shapes import Shape
from benchmarks.timing import Clock
from benchmarks.train_variants import CLASSES, Setup, Step
from fastvit_engine.distributed.world import join_world
from fastvit_engine.errors import UserError

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
WARM_UP = 5  # steps that are not timed


@dataclass
class Measured:
    """What came of one variant: an entry for each step, without the first ones in `ms`."""

    losses: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)  # until the host has queued the step
    memory_bytes: int | None = None  # its own at its peak; None on a CPU
    reason: str = ""  # why it takes no part, or stopped
    failed: bool = False  # it should have taken part


def batches(shape: Shape, batch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Images uint8 [B, H, W, 3] and labels, endless and the same in every run."""
    size = (shape.image, shape.image, 3)
    pictures = torch.randint(0, 256, (CLASSES, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for step in count():
        drawn = torch.Generator().manual_seed(step + 1)
        labels = torch.randint(0, CLASSES, (batch,), generator=drawn)
        noise = torch.randint(0, 128, (batch, *size), generator=drawn, dtype=torch.uint8)
        signal = torch.nn.functional.interpolate(pictures[labels].permute(0, 3, 1, 2).float(), size[:2])
        images = (signal.permute(0, 2, 3, 1) / 2).to(torch.uint8) + noise
        yield images.to(device), labels.to(device)


def measure(
    builds: Mapping[str, Callable[[Setup], Step]], shape: Shape, batch: int, steps: int, seconds: float
) -> dict[str, Any]:
    """Every variant's losses and times step by step, and its memory. Begins no step after `seconds`."""
    begun = time.monotonic()
    if "RANK" not in os.environ:
        os.environ |= ALONE
    with join_world() as world:
        setup = Setup(shape, batch, "bf16", world)
        racers = {name: Racer(build, setup) for name, build in builds.items()}
        clock, given = Clock(world.device), batches(shape, batch, world.device)
        for number in range(steps):
            if time.monotonic() - begun > seconds:
                break
            images, labels = next(given)
            first, order = number % len(racers), list(racers.values())
            for racer in order[first:] + order[:first]:
                racer.turn(images, labels, clock, timed=number >= WARM_UP)
        variants = {name: vars(racer.found) for name, racer in racers.items()}
        return {"environment": describe(world.device), "model": shape.name, "batch": batch, "variants": variants}


class Racer:
    """One variant, from its building on."""

    def __init__(self, build: Callable[[Setup], Step], setup: Setup) -> None:
        self.found, self._step = Measured(), None
        self._footprint = Footprint() if setup.world.device.type == "cuda" else None
        self._attempt(lambda: setattr(self, "_step", build(setup)))

    def turn(self, images: Tensor, labels: Tensor, clock: Clock, *, timed: bool) -> None:
        """One step, if there is a variant that still takes steps."""
        if (step := self._step) is None:
            return

        def take() -> None:
            clock.wait()
            host, begin = time.perf_counter(), clock.mark()
            loss = step(images, labels)
            end, host = clock.mark(), time.perf_counter() - host
            clock.wait()
            self.found.losses.append(loss.item())
            if timed:
                self.found.ms.append(clock.milliseconds(begin, end))
                self.found.host_ms.append(1e3 * host)

        self._attempt(take)

    def _attempt(self, work: Callable[[], None]) -> None:
        """Without stopping the others if it fails."""
        try:
            if self._footprint is None:
                work()
            else:
                self.found.memory_bytes = self._footprint.of(work)
        except Exception as error:  # a peer may throw anything
            self._step, self.found.failed = None, not isinstance(error, Unusable | UserError)
            said = f"{type(error).__name__}: {error}" if self.found.failed else str(error)
            self.found.reason = " ".join(said.split())[:300]


class Footprint:
    """Bytes of a GPU that belong to one of several variants: what its turns have left there, and most beside that.

    The memory of a CUDA graph counts whole: nobody else may use what the graph does not use just now.
    """

    def __init__(self) -> None:
        self._left = self._peak = 0

    def of(self, work: Callable[[], None]) -> int:
        """Does some work of the variant; the variant's peak so far."""
        before, idle = torch.cuda.memory_allocated(), idle_in_graphs()
        torch.cuda.reset_peak_memory_stats()
        work()
        self._peak = max(self._peak, self._left + torch.cuda.max_memory_allocated() - before)
        self._left += torch.cuda.memory_allocated() - before + idle_in_graphs() - idle
        self._peak = max(self._peak, self._left)
        return self._peak


def idle_in_graphs() -> int:
    """Bytes that CUDA graphs hold and no tensor occupies."""
    segments = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in segments)


def faster(base: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """How many times as fast a variant is as another, by the median of pairs, one for each step; None: not timed."""
    pairs = list(zip(base["ms"], row["ms"], strict=False))
    return median(before / now for before, now in pairs) if pairs else None
