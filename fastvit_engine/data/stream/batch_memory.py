"""Memory for the images of batches, which is used again when nobody holds a batch any more.

New memory costs a page fault every 4 kB, more time than to fill it. PyTorch itself uses pinned memory again, once the
device has read it; other memory is free here when it has no reference left but this one.
"""

import math
import mmap
import sys

import numpy as np
import torch
from torch import Tensor

_HELD = 3  # batches at a time, of shared memory


class BatchMemory:
    """Memory of one process, as much as is held at a time."""

    def __init__(self, pin_memory: bool, most: int) -> None:
        """`most`: images of the largest batch."""
        self.pin_memory, self.most = pin_memory, most
        self._kept: list[np.ndarray] = []

    def reserve(self, images: int, *shape: int) -> Tensor:
        """uint8 [images, *shape] with any content. With another `shape` than before, the memory so far is let go."""
        if self.pin_memory:
            return torch.empty((images, *shape), dtype=torch.uint8, pin_memory=True)
        if self._kept and self._kept[0].shape[1:] != shape:
            self._kept.clear()
        for number in range(len(self._kept)):
            if _is_free(self._kept, number):
                return torch.from_numpy(self._kept[number])[:images]
        self._kept.append(np.empty((self.most, *shape), np.uint8))
        return torch.from_numpy(self._kept[-1])[:images]


class SharedMemory:
    """Memory for a fixed number of batches, shared with the processes that are forked later: they fill it."""

    def __init__(self, being_filled: int, images: int, shape: tuple[int, ...]) -> None:
        """For so many batches that are filled at a time, each of up to `images` images of up to this shape."""
        slots, size = being_filled + _HELD, images * math.prod(shape)
        # Not a file in /dev/shm, which is small in many containers: processes that are forked share it too.
        self._slots = list(np.frombuffer(mmap.mmap(-1, slots * size), np.uint8).reshape(slots, size))
        self._free, self._released = list(range(slots)), list[int]()

    def take(self) -> int:
        """A slot to be filled."""
        self._take_back()
        return self._free.pop()  # the last that was used: some of it is still in a cache

    def images(self, slot: int, first: int, count: int, shape: tuple[int, ...]) -> Tensor:
        """uint8 [count, *shape]: the images of a batch at a slot, from the first on."""
        size = math.prod(shape)
        return torch.from_numpy(self._slots[slot])[first * size : (first + count) * size].view(count, *shape)

    def may_be_held(self) -> bool:
        """Whether another batch may be held as it is; otherwise there would be too few slots to fill."""
        self._take_back()
        return len(self._released) < _HELD

    def release(self, slot: int) -> None:
        """Lets a slot be taken again, once nobody holds its images."""
        self._released.append(slot)

    def _take_back(self) -> None:
        free = [slot for slot in self._released if _is_free(self._slots, slot)]
        self._released = [slot for slot in self._released if slot not in free]
        self._free += free


def _is_free(arrays: list[np.ndarray], number: int) -> bool:
    """Whether nobody else holds one of the arrays."""
    return sys.getrefcount(arrays[number]) == 2  # the list's, and the argument's
