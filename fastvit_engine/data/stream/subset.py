"""Subsets of the training samples (data.subset), nested in each other, and the exact order of a run over one.

Every sample has a random number, a pure function of the seed and of its place in the order of the shards; a subset is
made of the samples with the lowest numbers. So a smaller one is part of every larger one, whatever their sizes, and
classes have about the shares that they have in the whole.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastvit_engine.config import DataConfig
from fastvit_engine.config.subset import subset_size
from fastvit_engine.data.stream.order import Integers, SourceOrder, subset_draws
from fastvit_engine.errors import UserError

_BLOCK = 1 << 20  # numbers that are drawn at a time
_MARGIN = 8  # standard deviations


def subset_indices(num_samples: int, share_or_count: float, seed: int) -> Integers:
    """The samples of a subset as sorted numbers from 0 on, int64 [size]. The same for the same arguments, everywhere.

    num_samples: of the whole. share_or_count: as data.subset, a share in (0, 1] that is a float, or a number of samples
    from 2 on that is an integer. The size is exact; of a share, the nearest integer to share * num_samples. Takes
    memory for the subset only. Raises UserError for anything else.
    """
    size = subset_size(num_samples, share_or_count)
    share = size / num_samples
    margin = _MARGIN * np.sqrt(num_samples * share * (1 - share)) + _MARGIN
    numbers, draws = _below(min(1.0, share + margin / num_samples), num_samples, seed)
    if len(numbers) < size:
        numbers, draws = _below(1.0, num_samples, seed)
    # Of equal draws the earlier sample counts as lower: so subsets are nested even then.
    highest = np.partition(draws, size - 1)[size - 1]
    chosen = draws < highest
    equal = np.flatnonzero(draws == highest)
    chosen[equal[: size - np.count_nonzero(chosen)]] = True
    return numbers[chosen]


def _below(share: float, num_samples: int, seed: int) -> tuple[Integers, NDArray[np.uint64]]:
    """The samples, in order, whose draw is in the lowest `share` of the range, and their draws."""
    bound = np.uint64(min(int(share * 2.0**64), 2**64 - 1))
    numbers, draws = [], []
    for block, drawn in enumerate(subset_draws(seed, num_samples, _BLOCK)):
        inside = np.flatnonzero(drawn <= bound)
        numbers.append(inside + block * _BLOCK)
        draws.append(drawn[inside])
    return np.concatenate(numbers), np.concatenate(draws)


def subsets_of_sources(samples: Sequence[int], data: DataConfig, seed: int) -> list[Integers] | None:
    """The samples of each source that a run is to read, sorted and numbered from the source's first; None: all.

    samples: of each source. A subset is one of all sources, laid end to end. Raises UserError if a source has none.
    """
    if data.subset is None:
        return None
    ends = np.cumsum(samples)
    chosen = subset_indices(int(ends[-1]), data.subset, seed)
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    for source, part in zip(data.sources, parts, strict=True):
        if len(part) == 0:
            raise UserError(
                f"data.subset = {data.subset} has {len(chosen):,} samples, none of them of {source.shards} in "
                "data.train: raise it, or leave the source out"
            )
    return [part - end + own for part, end, own in zip(parts, ends, samples, strict=True)]


class SubsetOrder(SourceOrder):
    """Endless epochs over some samples of a source, each exactly once per epoch."""

    def __init__(
        self,
        chosen: Integers,
        counts: NDArray[np.integer],
        *,
        seed: int,
        lanes: int,
        window: int,
        source: int = 0,
    ) -> None:
        """chosen: sorted numbers of samples, in a source whose shards hold `counts` of them."""
        ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        shards = np.searchsorted(ends, chosen, side="right")
        kept = np.bincount(shards, minlength=len(ends))
        super().__init__(kept, seed=seed, lanes=lanes, window=window, source=source, whole=True)
        self._rows = (chosen - (ends - counts)[shards]).astype(np.uint32)  # of each chosen sample within its shard
        self._first = np.cumsum(kept) - kept  # number of each shard's first one among them

    def locate(self, positions: Integers) -> tuple[Integers, Integers, Integers, Integers]:
        """As SourceOrder; rows are those of the whole shards."""
        shards, places, epochs, inside = super().locate(positions)
        return shards, self._rows[self._first[shards] + places].astype(np.int64), epochs, inside
