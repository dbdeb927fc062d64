"""Saving while training continues: one thread copies to host memory, which the next update waits for; one writes.

Every process has both. The second writes its file and reports through the store of the process group; the one of rank
0 waits for all reports and publishes. Collectives stay with the main thread.
"""

import contextlib
import json
import mmap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import Store

from fastvit_engine.checkpoint.format import Block, Manifest, StoredFile, StoredTensor, TensorFile
from fastvit_engine.checkpoint.store import Checkpoint, CheckpointStore
from fastvit_engine.engine.protocol import ParameterSlice
from fastvit_engine.errors import UserError
from fastvit_engine.models.weights.safetensors_file import DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended: with an error in words, or published."""

    checkpoint: Checkpoint
    error: str | None = None
    lost: bool = False  # another run owns the place now: this one must not touch anything there
    bytes: int = 0  # of all files
    seconds: float = 0.0  # from the copy to the publication


class Placed(NamedTuple):
    """A slice of one kind, and the first of its bytes in memory that holds several."""

    kind: str
    part: ParameterSlice
    offset: int


def placed_in_order(slices: Mapping[str, Sequence[ParameterSlice]]) -> list[Placed]:
    """The slices of all kinds one after the other, so that each is aligned."""
    everything = [(kind, part) for kind, of_kind in slices.items() for part in of_kind]
    everything.sort(key=lambda entry: -entry[1].values.element_size())
    offsets = accumulate((part.values.nbytes for _, part in everything), initial=0)
    return [Placed(kind, part, offset) for (kind, part), offset in zip(everything, offsets, strict=False)]


class Transfer(NamedTuple):
    """What to copy where: pairs of a slice's memory and its values."""

    buffers: list[tuple[Tensor, Tensor]]  # of the module, whose next forward pass may change them
    targets: list[Tensor]
    values: list[Tensor]  # of all else, which the next update changes


def transfer_into(memory: Tensor, placed: Sequence[Placed]) -> Transfer:
    """Of the slices into memory, uint8 [bytes]."""
    transfer = Transfer([], [], [])
    for kind, part, offset in placed:
        target = memory[offset : offset + part.values.nbytes].view(part.values.dtype)
        if kind == "buffer":
            transfer.buffers.append((target, part.values))
        else:
            transfer.targets.append(target)
            transfer.values.append(part.values)
    return transfer


class HostCopy:
    """A copy of parameter slices in host memory (pinned if they come from a GPU), which the next copy reuses.

    A thread makes it while training computes the next gradients: nothing that it reads changes before the next update.
    On a GPU it has a stream of its own, so that the copies run beside kernels.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._stream: Any = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def begin(self, slices: Mapping[str, Sequence[ParameterSlice]]) -> list[Block]:
        """Begins to copy the slices of all kinds; their bytes are there after `wait`. Invalidates the copy before."""
        placed = placed_in_order(slices)
        size = sum(part.values.nbytes for _, part, _ in placed)
        if self._memory.numel() < size:
            self._memory = torch.empty(0, dtype=torch.uint8)  # free the old before
            self._memory = _host_memory(size, pinned=any(part.values.is_cuda for _, part, _ in placed))
        self.begin_in(transfer_into(self._memory, placed))
        view = self._memory.numpy().data
        return [
            Block(
                f"{kind}/{part.name}@{part.start}",
                DTYPE_NAMES[part.values.dtype],
                view[offset : offset + part.values.nbytes],
            )
            for kind, part, offset in placed
        ]

    def begin_in(self, transfer: Transfer, when_copied: Callable[[], None] = lambda: None) -> None:
        """As `begin`, into given memory. when_copied: what the thread calls when all bytes are there."""
        for target, values in transfer.buffers:
            target.copy_(values)
        device = next((values.device for values in transfer.values if values.is_cuda), None)
        if device is not None:
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # for the update that has just been queued
        self._error = None
        self._thread = threading.Thread(
            target=self._copy, args=[transfer, when_copied], name="copy for a checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns when all is copied; raises what went wrong. May be called from several threads."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _copy(self, transfer: Transfer, when_copied: Callable[[], None]) -> None:
        try:
            if transfer.targets:
                with torch.cuda.stream(self._stream):  # which does nothing without one
                    torch._foreach_copy_(transfer.targets, transfer.values, non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()
            when_copied()
        except Exception as error:  # to be raised in whoever waits
            self._error = error


class SaveInFlight:
    """One save on its way to `store`; `outcome` is set on rank 0 when it has ended."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        manifest: Manifest,  # without files
        blocks: Sequence[Block],
        copied: Callable[[], None],
        reports: Store,
        rank: int,
        size: int,
        publish: Callable[[Manifest], None],
    ) -> None:
        self.checkpoint, self._manifest = checkpoint, manifest
        self._file, self._copied = TensorFile(blocks), copied
        self._reports, self._rank, self._size, self._publish = reports, rank, size, publish
        self._store: CheckpointStore = checkpoint.store
        self._started = time.perf_counter()
        self.outcome: SaveOutcome | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        self._reports.set(f"{self.checkpoint.name}/{self._rank}", json.dumps(self._write()))
        if self._rank == 0:
            try:
                outcome = self._finish([self._report_of(rank) for rank in range(self._size)])
            except UserError as error:
                outcome = SaveOutcome(self.checkpoint, error=str(error), lost=True)
            except Exception as error:  # whatever it is, the main thread must hear of it
                outcome = SaveOutcome(self.checkpoint, error=_one_line(error))
            if outcome.error is not None and not outcome.lost:
                with contextlib.suppress(OSError):  # what is left then goes when the run starts again
                    self._store.discard(self.checkpoint.name)
            self.outcome = outcome

    def _write(self) -> dict[str, Any]:
        """Writes this process's file; returns its entry in the manifest, or what went wrong."""
        try:
            self._copied()
            self._store.write(self.checkpoint.name, file_name(self._rank), self._file.chunks())
            return {"file": asdict(self._file.stored())}
        except Exception as error:
            return {"error": _one_line(error)}

    def _report_of(self, rank: int) -> dict[str, Any]:
        key = f"{self.checkpoint.name}/{rank}"
        while not self._reports.check([key]):  # not `wait`, which would keep other threads from the store
            time.sleep(_POLL_SECONDS)
        report = json.loads(self._reports.get(key))
        self._reports.delete_key(key)
        return report

    def _finish(self, reports: Sequence[Mapping[str, Any]]) -> SaveOutcome:
        failed = [f"{report['error']} on rank {rank}" for rank, report in enumerate(reports) if "error" in report]
        if failed:
            return SaveOutcome(self.checkpoint, error="; ".join(failed[:3]))
        for rank, report in enumerate(reports):
            entry = report["file"]
            tensors = [(kind, name, StoredTensor(**tensor)) for kind, name, tensor in entry["tensors"]]
            self._manifest.files[file_name(rank)] = StoredFile(entry["size"], tensors)
        if (gap := self._manifest.gap()) is not None:
            return SaveOutcome(self.checkpoint, error=gap)
        self._publish(self._manifest)
        size = sum(file.size for file in self._manifest.files.values())
        return SaveOutcome(self.checkpoint, bytes=size, seconds=time.perf_counter() - self._started)


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _host_memory(size: int, *, pinned: bool) -> Tensor:
    """`size` bytes, uninitialised; in huge pages if the system gives them, which a copy fills twice as fast."""
    if pinned:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    memory = mmap.mmap(-1, size)
    with contextlib.suppress(OSError, AttributeError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
