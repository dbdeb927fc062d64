"""The processes of a run: joining them, agreeing on errors, small reductions."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastvit_engine.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the `size` processes of the run, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def node_ranks(self) -> range:
        """The ranks on this machine, as torchrun says; without it, all."""
        first = self.rank - int(os.environ["LOCAL_RANK"])
        return range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", self.size)))

    def sum(self, values: Sequence[float] | Tensor) -> Tensor:
        """Elementwise sum over all processes, in float64; collective."""
        return self._reduce(values, dist.ReduceOp.SUM, torch.float64)

    def max(self, values: Sequence[float] | Tensor) -> Tensor:
        """Elementwise maximum over all processes, in float64; collective."""
        return self._reduce(values, dist.ReduceOp.MAX, torch.float64)

    def sum_int64(self, value: int) -> int:
        """Sum modulo 2**64 over all processes, as an unsigned number; collective."""
        signed = value - 2**64 if value >= 2**63 else value
        total = self._reduce(torch.tensor([signed]), dist.ReduceOp.SUM, torch.int64)
        return int(total.item()) % 2**64

    def _reduce(self, values: Sequence[float] | Tensor, operation: Any, dtype: torch.dtype) -> Tensor:
        reduced = torch.as_tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(reduced, op=operation)
        return reduced.cpu()

    def agree(self, error: Exception | None) -> None:
        """Raises UserError on every process when any of them holds an error; collective."""
        errors = self.gather(None if error is None else str(error))
        failed = [(rank, text) for rank, text in enumerate(errors) if text is not None]
        if failed:
            rank, text = failed[0]
            raise UserError(
                text if self.size == 1 or len(failed) == self.size else f"{text} (on rank {rank})"
            ) from error

    def on_main(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0 and returns its value, or raises its UserError, on every process; collective."""
        outcome: list[T | UserError | None] = [None]
        if self.is_main:
            try:
                outcome = [function()]
            except UserError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return cast(T, outcome[0])

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, on every process; collective."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        dist.barrier()


@contextmanager
def join_world() -> Iterator[World]:
    """Joins the processes that RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; leaves after."""
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available()
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK is {local_rank} but this machine shows {torch.cuda.device_count()} GPU(s): "
            "start one process a GPU, and check CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
    # Only on the way out without an error: a failed peer would never reach the barrier. Without the barrier, Gloo's
    # threads sometimes abort the interpreter at exit.
    dist.barrier()
    dist.destroy_process_group()
