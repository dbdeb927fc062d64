"""Bytes from rank to rank beside what training sends: through a process group of their own, each with its CRC-32."""

import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fastvit_engine.checkpoint.format import DamagedCheckpoint

_CHUNK = 2**26  # bytes of one operation


class Messages:
    """Sends and receives host memory; the order of messages between two ranks is kept. May be used from any thread."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """group: of all ranks, through Gloo."""
        self._group = group

    @classmethod
    def open(cls, timeout_seconds: float) -> "Messages":
        """Collective. timeout_seconds: for each operation."""
        return cls(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds)))

    def send(self, numbers: Sequence[int], contents: Sequence[Tensor], to: int) -> Callable[[], None]:
        """Begins to send numbers and contents, uint8 [bytes]; what it returns waits until they may change."""
        sums = [zlib.crc32(content.numpy().data) for content in contents]
        header = torch.tensor([*numbers, *sums], dtype=torch.int64)
        chunks = [header, *(chunk for content in contents if len(content) for chunk in content.split(_CHUNK))]
        works = [(self._group.send([chunk], to, 0), chunk) for chunk in chunks]  # which must live until then

        def wait() -> None:
            for work, _ in works:
                work.wait()

        return wait

    def receive(
        self, numbers: int, contents: int, source: int, memory: Callable[[Sequence[int]], Sequence[Tensor]]
    ) -> list[int]:
        """So many numbers and contents of a message. memory: says where the contents go, once the numbers are known.

        Raises DamagedCheckpoint if the contents are not those that were sent.
        """
        header = torch.empty(numbers + contents, dtype=torch.int64)
        self._group.recv([header], source, 0).wait()
        found = header.tolist()
        damaged = False
        for content, sent in zip(memory(found[:numbers]), found[numbers:], strict=True):
            for chunk in content.split(_CHUNK) if len(content) else ():
                self._group.recv([chunk], source, 0).wait()
            damaged = damaged or zlib.crc32(content.numpy().data) != sent
        if damaged:
            raise DamagedCheckpoint(f"a copy in memory was altered on its way from rank {source}")
        return found[:numbers]
