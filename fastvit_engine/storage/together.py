"""Byte ranges of a batch that are read at the same time, in bounded memory, and given out in order."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

GAP_BYTES = 2**16  # between two ranges that are read with one request: less than a request takes as long
MOST_MERGED = 2**23  # bytes of one request for several ranges
MOST_HELD = 2**26  # bytes asked for and not given out yet, unless one range alone is larger


@dataclass
class _Read:
    """One request, for one range or for neighbours."""

    shard: int
    start: int
    stop: int
    left: int = 1  # ranges that have not been given out
    data: "Future[bytes] | None" = None  # once it was asked for


def read_together(
    ranges: Sequence[tuple[int, int, int]], read: Callable[[int, int, int], bytes], threads: Executor
) -> Generator[bytes]:
    """The bytes of each (shard, offset, length), in order. `read` takes the same, and is called by the threads."""
    reads = merge(ranges)
    due = list({id(one): one for one in reads}.values())  # in the order of their first use
    asked = held = 0
    try:
        for (_, offset, length), one in zip(ranges, reads, strict=True):
            while asked < len(due) and (one.data is None or held + _size(due[asked]) <= MOST_HELD):
                following = due[asked]
                following.data = threads.submit(read, following.shard, following.start, _size(following))
                asked, held = asked + 1, held + _size(following)
            assert one.data is not None  # the loop has come to it
            data = one.data.result()
            yield data if len(data) == length else data[offset - one.start : offset - one.start + length]
            one.left -= 1
            if not one.left:
                held -= _size(one)
                one.data = None
    finally:
        for one in due:
            if one.data is not None:
                one.data.cancel()


def merge(ranges: Sequence[tuple[int, int, int]]) -> list[_Read]:
    """The request that brings each range; neighbours in a shard share one."""
    reads: list[_Read | None] = [None] * len(ranges)
    last: _Read | None = None
    for number in sorted(range(len(ranges)), key=ranges.__getitem__):
        shard, start, length = ranges[number]
        stop = start + length
        if (
            last is not None
            and last.shard == shard
            and start <= last.stop + GAP_BYTES
            and max(stop, last.stop) - last.start <= MOST_MERGED
        ):
            last.stop, last.left = max(stop, last.stop), last.left + 1
        else:
            last = _Read(shard, start, stop)
        reads[number] = last
    return [one for one in reads if one is not None]


def _size(one: _Read) -> int:
    return one.stop - one.start
