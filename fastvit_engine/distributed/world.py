"""The processes of a run: how they join, share the result of rank 0, and reduce small values."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastvit_engine.distributed.roll_call import call_roll
from fastvit_engine.distributed.store import JobStore, is_loopback
from fastvit_engine.errors import Preempted, RestartError, UserError
from fastvit_engine.observe.disk import if_possible
from fastvit_engine.observe.units import counted

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
        """The ranks on this machine according to torchrun; without it, all."""
        first = self.rank - int(os.environ["LOCAL_RANK"])
        return range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", self.size)))

    def sum(self, values: Sequence[float] | Tensor) -> Tensor:
        """Elementwise sum over all processes, in float64; collective."""
        return self._reduce(values, dist.ReduceOp.SUM, torch.float64)

    def sum_in_place(self, values: Tensor) -> Tensor:
        """Sums a tensor of the device over all processes, in its own dtype and without waiting for it; collective."""
        dist.all_reduce(values)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The tensors [B, ...] of all processes, which have one shape, by rank: [size B, ...]; collective."""
        gathered = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

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

    def on_main(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0 and returns its value, or raises its UserError or RestartError, on every process.

        Collective.
        """
        outcome: list[T | UserError | RestartError | None] = [None]
        if self.is_main:
            try:
                outcome = [function()]
            except (UserError, RestartError) as error:
                error.of_all = True
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], UserError | RestartError):
            raise outcome[0]
        return cast(T, outcome[0])

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, on every process; collective."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrites a tensor on the world's device with that of rank 0; collective."""
        dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        dist.barrier()


def _through(store: dist.Store | None, timeout: timedelta) -> dict[str, Any]:
    """The store of a job on one machine that no launcher serves, as arguments of `init_process_group`.

    `store`: that of the roll call; None if there is one process.
    """
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if served or not is_loopback(address):
        return {}
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = store or JobStore(address, port, size, is_master=rank == 0, timeout=timeout)
    return {"store": store, "rank": rank, "world_size": size}


@contextmanager
def join_world(
    timeout_seconds: float = 1800.0,
    dumps: Path | None = None,
    introduce: Callable[[dist.Store], None] = lambda store: None,
) -> Iterator[World]:
    """Joins the processes that RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; leaves after.

    `timeout_seconds`: that a process waits for the others to join, and in any collective operation until
    `limit_collectives` says otherwise. `dumps`: folder for what NCCL has to tell of an operation that timed out.
    `introduce`: called, if there are several processes, when all have reported and none has joined, with their store.
    Raises RestartError if not all processes join, UserError if one of them has ended because of bad input.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available()
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK is {local_rank} but this machine shows {counted(torch.cuda.device_count(), 'GPU')}: "
            "start one process per GPU, and check CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        _prepare_nccl(dumps)
    try:
        timeout = timedelta(seconds=timeout_seconds)
        store = call_roll(timeout_seconds)
        if store is not None:
            introduce(store)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, **_through(store, timeout))
    except RuntimeError as error:
        cause = collective_failure(error)
        if cause is None:
            raise
        raise RestartError(
            f"rank {os.environ['RANK']} could not join the other processes at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {timeout_seconds:.0f} s: {cause}"
        ) from error
    del store  # the group has its own
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
    except Preempted:  # which all processes are, at once
        _leave_world()
        raise
    # Not after an error: a failed peer would never reach the barrier.
    _leave_world()


def limit_collectives(timeout_seconds: float) -> None:
    """Limits collective operations to `timeout_seconds` in every process group that exists now.

    DeepSpeed makes groups of its own, with PyTorch's default of 30 minutes for Gloo and 10 for NCCL.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def collective_failure(error: Exception) -> str | None:
    """Says in a sentence how a collective operation or the job's store failed; None for an error of another kind."""
    text = " ".join(str(error).split())
    if not isinstance(error, dist.DistError) and not (isinstance(error, RuntimeError) and "gloo" in text.lower()):
        return None
    for padding in (" Exception raised from ", " This is typically caused by "):  # C++ frames; general advice
        text = text.partition(padding)[0]
    return re.sub(r"\[[^\]]*\.(cc|cpp|h|hpp):\d+\] *", "", text)  # where in the library's source it was raised


def _prepare_nccl(dumps: Path | None) -> None:
    """Makes a process end if an NCCL operation fails or times out, after it has written the latest ones to `dumps`.

    Variables that the user has set stay. Names of PyTorch 2.11 and later: ProcessGroupNCCL.hpp, FlightRecorder.hpp.
    """
    settings = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # end the process, without another NCCL call that could hang
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",  # operations that the flight recorder remembers
    }
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" in os.environ:  # the older name
        del settings["TORCH_FR_BUFFER_SIZE"]
    if (
        dumps is not None
        and "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in os.environ  # likewise
        and if_possible(partial(dumps.mkdir, parents=True, exist_ok=True), str(dumps))
    ):
        settings["TORCH_FR_DUMP_TEMP_FILE"] = str(dumps / "nccl-rank-")  # the rank is appended
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _leave_world() -> None:
    dist.barrier()  # without it, Gloo's threads sometimes abort the interpreter at exit
    dist.destroy_process_group()
