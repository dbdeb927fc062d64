"""The order of training samples: a pure function of (index, seed, position), and of nothing else.

Position t is the t-th sample of the whole run; step s trains on the positions from s * global batch on, which the ranks
divide among them (see `batch_split`). So the samples of a step depend on neither the world size nor the workers,
the state of the data is the one integer `consumed`, and resuming at any position costs milliseconds.

* An epoch permutes the shards, lays their samples end to end in a circle, rotates it by a random amount and cuts it
  into L equal, contiguous *lanes*: the parts of the data that a batch draws from in turn (data.lanes). The rest, fewer
  than L samples, is dropped, and is another part of the data in every epoch.
* A lane permutes its samples within *windows* of W neighbours. Position p of an epoch is sample p // L of lane p % L,
  in a random order of the lanes. A batch thus mixes L parts of the data, while a lane reads only the few shards of its
  window.
* An epoch visits each sample at most once; an epoch of a subset (see `subset`) drops none and visits each exactly once.
  It may end, and the next begin, inside a batch.
* Several sources: a cycle has a fixed number of slots, shared by weight; each source runs through its own epochs.

All randomness is raw output of Philox, a counter-based generator, addressed by (seed, source, epoch, lane, window).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

CYCLE = 1000  # slots that the sources of a mixture share: weights are exact to a thousandth
MAX_LANES = 256  # from here on batches are practically uniform draws
_SMALLEST_LANE = 100  # samples: so at most one in a hundred samples is left out of an epoch

# What a random number is drawn for.
_SHARDS, _LANES, _WINDOW, _ROTATION, _SLOTS, _SUBSET = range(6)


class Locations(NamedTuple):
    """Where the samples at some positions of a run lie; each [n]."""

    source: Integers
    shard: Integers  # within the source
    row: Integers  # within the shard
    epoch: Integers  # of the source
    position: Integers  # within that epoch


def choose_lanes(samples: int) -> int:
    """Lanes for a source of so many samples: a power of two, so that common numbers of ranks divide it."""
    lanes = 1
    while 2 * lanes <= min(MAX_LANES, samples // _SMALLEST_LANE):
        lanes *= 2
    return lanes


class SourceOrder:
    """Endless epochs over one source, whose shards hold `counts` samples, in `lanes` lanes with windows of `window`.

    whole: an epoch has all samples. Those that would be left over make some lanes, others in each epoch, longer by one.
    """

    def __init__(
        self,
        counts: NDArray[np.integer],
        *,
        seed: int,
        lanes: int,
        window: int,
        source: int = 0,
        whole: bool = False,
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        self.lanes, self.lane_length = lanes, self.samples // lanes
        if self.lane_length == 0:
            raise ValueError(f"{self.samples} samples are too few for {lanes} lanes")
        self.longer_lanes = self.samples % lanes if whole else 0
        longest = self.lane_length + (self.longer_lanes > 0)
        self.window = min(window, longest)
        self.samples_per_epoch = lanes * self.lane_length + self.longer_lanes
        self._seed, self._source = seed, source
        self._windows_per_lane = -(-longest // self.window)
        self._epochs: dict[int, _Epoch] = {}
        # The permutation of each lane's current window, and which window of which epoch that is.
        self._table = np.empty((lanes, self.window), dtype=np.uint32)
        self._current = np.full(lanes, -1, dtype=np.int64)

    def locate(self, positions: Integers) -> tuple[Integers, Integers, Integers, Integers]:
        """(shard, row, epoch, position in the epoch) of positions >= 0 of this source, each [n]."""
        epochs, inside = np.divmod(positions, self.samples_per_epoch)
        windows = inside // (self.lanes * self.window)
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        numbers = epochs * self._windows_per_lane + windows
        for number in np.unique(numbers):  # one or two, as neighbouring positions share a window
            chosen = numbers == number
            epoch, window = divmod(int(number), self._windows_per_lane)
            shards[chosen], rows[chosen] = self._locate_in_window(inside[chosen], epoch, window, int(number))
        return shards, rows, epochs, inside

    def _locate_in_window(self, inside: Integers, epoch: int, window: int, number: int) -> tuple[Integers, Integers]:
        order = self._epoch(epoch)
        lane = order.lanes[inside % self.lanes]
        first = window * self.window  # sample of the lane
        for other in np.unique(lane[self._current[lane] != number]):
            length = min(self.window, int(order.lengths[other]) - first)
            draws = _draw(self._seed, _WINDOW, length, self._source, epoch, int(other), window)
            self._table[other, :length] = np.argsort(draws, kind="stable")
            self._current[other] = number
        sample = first + self._table[lane, inside // self.lanes - first]
        line = (order.starts[lane] + sample + order.rotation) % self.samples
        at = np.searchsorted(order.ends, line, side="right")
        shard = order.shards[at]
        return shard, line - (order.ends[at] - self.counts[shard])

    def _epoch(self, epoch: int) -> "_Epoch":
        if epoch not in self._epochs:
            if len(self._epochs) == 2:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = _Epoch(self, epoch, self._seed, self._source)
        return self._epochs[epoch]


class _Epoch:
    """What an epoch permutes as a whole."""

    def __init__(self, order: SourceOrder, epoch: int, seed: int, source: int) -> None:
        draws = _draw(seed, _SHARDS, len(order.counts), source, epoch)
        self.shards = np.argsort(draws, kind="stable")
        self.ends = np.cumsum(order.counts[self.shards])  # of each shard on the line
        self.rotation = int(_draw(seed, _ROTATION, 1, source, epoch)[0] % np.uint64(order.samples))
        self.lanes = np.argsort(_draw(seed, _LANES, order.lanes, source, epoch), kind="stable")
        self.lengths = np.full(order.lanes, order.lane_length)
        self.lengths[self.lanes[: order.longer_lanes]] += 1  # those that the last, incomplete row of an epoch has
        self.starts = np.cumsum(self.lengths) - self.lengths  # of each lane on the line


class Order:
    """The order of a whole run over one source, or over several mixed by weight."""

    def __init__(self, sources: Sequence[SourceOrder], shares: Sequence[int], seed: int) -> None:
        """`shares`: slots of each source in a cycle (see `share_slots`)."""
        self.sources = sources
        slots = np.repeat(np.arange(len(sources)), shares)
        self._slots = slots[np.argsort(_draw(seed, _SLOTS, len(slots)), kind="stable")]  # slot -> source
        self._shares = np.asarray(shares, dtype=np.int64)
        self._before = np.empty_like(self._slots)  # earlier slots of the same source in the cycle
        for source in range(len(sources)):
            own = self._slots == source
            self._before[own] = np.arange(own.sum())

    def locate(self, positions: Integers) -> Locations:
        """Where the positions (int64 [n], >= 0) of the run lie."""
        cycle, slot = np.divmod(positions, len(self._slots))
        source = self._slots[slot]
        inside = cycle * self._shares[source] + self._before[slot]
        shard, row, epoch, position = (np.empty_like(positions) for _ in range(4))
        for number in np.unique(source):
            own = source == number
            shard[own], row[own], epoch[own], position[own] = self.sources[number].locate(inside[own])
        return Locations(source, shard, row, epoch, position)


def subset_draws(seed: int, samples: int, size: int) -> Iterator[NDArray[np.uint64]]:
    """A draw for each of `samples` samples, `size` at a time. A subset is made of the samples with the lowest ones."""
    generator = _philox(seed, _SUBSET)
    for start in range(0, samples, size):
        yield generator.random_raw(min(size, samples - start))


def share_slots(weights: Sequence[float]) -> list[int]:
    """The slots of a cycle over sources in proportion to their weights, by largest remainder. One source: one slot."""
    if len(weights) == 1:
        return [1]
    exact = np.asarray(weights, dtype=np.float64) / np.sum(weights) * CYCLE
    slots = np.floor(exact).astype(np.int64)
    for source in np.argsort(slots - exact, kind="stable")[: CYCLE - slots.sum()]:
        slots[source] += 1
    return [int(number) for number in slots]


def _philox(
    seed: int, purpose: int, source: int = 0, epoch: int = 0, lane: int = 0, window: int = 0
) -> np.random.Philox:
    # The lowest word of the counter runs; the others are the address.
    # As unsigned numbers: a list with one beyond int64 would become float64, and lose digits.
    key, counter = (seed % 2**64, purpose << 32 | source), (0, window, lane, epoch)
    return np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64))


def _draw(seed: int, purpose: int, size: int, *address: int) -> NDArray[np.uint64]:
    """`size` raw 64-bit draws: unlike the methods of Generator, NumPy guarantees them for all its versions."""
    return _philox(seed, purpose, *address).random_raw(size)
