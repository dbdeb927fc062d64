"""Ranks that are threads of one process: enough for what they tell each other, without torch.distributed."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


class ThreadWorld:
    """One of `size` ranks, with the collectives of `train.distributed.World` that checks of health use."""

    def __init__(self, rank: int, size: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.device = rank, size, torch.device("cpu")
        self._shared, self._barrier = shared, barrier

    def gather(self, value: Any) -> list[Any]:
        self._shared[self.rank] = value
        self._barrier.wait(timeout=60)
        values = list(self._shared)
        self._barrier.wait(timeout=60)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.gather(values.double())).sum(dim=0)


def on_ranks(size: int, function: Callable[[ThreadWorld], Any]) -> list[Any]:
    """What `function` returns on each of `size` ranks."""
    shared, barrier = [None] * size, threading.Barrier(size)
    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(function, ThreadWorld(rank, size, shared, barrier)) for rank in range(size)]
        return [future.result() for future in futures]
