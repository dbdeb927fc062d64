"""The memory that one rank copies its state to: two slots, written in turn, of which one is always whole.

A slot counts only while the record in the first page says so. The record is erased before the slot is written and
written after all of it, with a checksum. So a copy that was cut short by a kill is no copy, and the one before is still
there. The bytes themselves are not summed: they never leave memory, where the weights have no checksum either.
"""

import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

_PAGE = 4096
_SLOTS = 2
_RECORD = struct.Struct("<QQQQQQ")  # sequence, step, first byte of data and of description, its bytes and CRC-32
_CHECKED = struct.Struct("<QQQQQQQ")  # and the CRC-32 of all that
_ROOM = struct.Struct("<QQ")  # bytes for the data and for the description of each slot
_ROOM_AT = _PAGE - _ROOM.size


class Copy(NamedTuple):
    """A whole copy: the `sequence`-th of the run, of the state after `step` steps."""

    sequence: int
    step: int
    start: int  # of the data in the area
    description: bytes


class Slot(NamedTuple):
    """Where a copy is being written: its data may take `room` bytes from `start` on, which is a whole page."""

    number: int
    start: int
    room: int


class Area:
    """The memory behind a descriptor, which several processes may have; one of them writes.

    The same copy of all ranks has the same sequence number, which rises.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._mapped: dict[Slot, mmap.mmap] = {}

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return os.fstat(self.descriptor).st_size

    def copies(self) -> dict[int, Copy]:
        """The whole copies, by sequence number."""
        found = (self._read(slot) for slot in range(_SLOTS))
        return {copy.sequence: copy for copy in found if copy is not None}

    def map(self, start: int, size: int) -> mmap.mmap:
        """The data that start there, to read: what is written to them stays with this process."""
        # Writable, although nobody writes: PyTorch warns of memory that it must not write to.
        return mmap.mmap(self.descriptor, size, access=mmap.ACCESS_COPY, offset=start)

    def keep_only(self, sequence: int | None) -> None:
        """Drops all copies but that one; None: all."""
        for slot in range(_SLOTS):
            copy = self._read(slot)
            if copy is None or copy.sequence != sequence:
                self._erase(slot)

    # ---- what the one that writes calls

    def begin(self, data: int, description: int) -> "Slot":
        """Erases the older copy, whose slot is the next to be written, with so many bytes.

        Erases both if they need more room than there is.
        """
        room = self._room()
        if data > room[0] or description > room[1]:
            os.ftruncate(self.descriptor, 0)
            room = _pages(max(data, room[0])), _pages(max(2 * description, room[1]))
            os.ftruncate(self.descriptor, _PAGE + _SLOTS * sum(room))
            os.pwrite(self.descriptor, _ROOM.pack(*room), _ROOM_AT)
        held = [self._read(number) for number in range(_SLOTS)]
        number = min(range(_SLOTS), key=lambda slot: -1 if (copy := held[slot]) is None else copy.sequence)
        self._erase(number)
        return Slot(number, _PAGE + number * sum(room), room[0])

    def memory(self, slot: Slot) -> mmap.mmap:
        """The room for the data of a slot, to write to; it stays mapped."""
        if slot not in self._mapped:
            self._mapped[slot] = mmap.mmap(self.descriptor, slot.room, offset=slot.start)
        return self._mapped[slot]

    def commit(self, slot: Slot, sequence: int, step: int, description: bytes) -> None:
        """The data of the slot are there: from now on, it counts."""
        at = slot.start + slot.room
        os.pwrite(self.descriptor, description, at)
        record = _RECORD.pack(sequence, step, slot.start, at, len(description), zlib.crc32(description))
        os.pwrite(self.descriptor, record + struct.pack("<Q", zlib.crc32(record)), slot.number * _CHECKED.size)

    def _room(self) -> tuple[int, int]:
        """Bytes for the data and for the description of each slot."""
        found = os.pread(self.descriptor, _ROOM.size, _ROOM_AT)
        data, description = _ROOM.unpack(found) if len(found) == _ROOM.size else (0, 0)
        return data, description

    def _erase(self, slot: int) -> None:
        if self.size:
            os.pwrite(self.descriptor, bytes(_CHECKED.size), slot * _CHECKED.size)

    def _read(self, slot: int) -> Copy | None:
        record = os.pread(self.descriptor, _CHECKED.size, slot * _CHECKED.size)
        if len(record) < _CHECKED.size or record == bytes(_CHECKED.size):
            return None
        sequence, step, start, at, length, crc, own_crc = _CHECKED.unpack(record)
        if zlib.crc32(record[: _RECORD.size]) != own_crc:
            return None
        description = os.pread(self.descriptor, length, at)
        return Copy(sequence, step, start, description) if zlib.crc32(description) == crc else None


def _pages(size: int) -> int:
    """Bytes of the pages that so many bytes take."""
    return -(-size // _PAGE) * _PAGE


def newest_common(areas: Sequence[Area]) -> int | None:
    """The highest sequence number of which every area has a whole copy; None if there is none."""
    held = [area.copies().keys() for area in areas]
    return max(set(held[0]).intersection(*held[1:]), default=None) if held else None
