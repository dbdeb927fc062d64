"""Why training waits for its data, if it does."""

import os
from collections.abc import Sequence

from fastvit_engine.cores import cores_here
from fastvit_engine.data.stream.batch import StageSeconds

WARN_FROM = 0.2  # of the time between two log lines

_REMEDIES = {
    "read": "the storage is slow: copy the shards to a faster disk, or try more data.num_workers than cores",
    "decode": "decoding is slow: make the shards again with smaller images; `fastvit data bench SHARDS --repack 256` "
    "measures what that brings",
    "augment": "cropping and resizing is slow: make the shards again with images nearer to model.image_size; "
    "`fastvit data bench SHARDS --repack 256` measures what that brings",
}


class DataWait:
    """Collects where the time of this process's decoding workers went, and warns once in a run."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._seconds = StageSeconds()
        self._warned = False

    def add(self, seconds: StageSeconds) -> None:
        self._seconds = self._seconds.plus(seconds)

    def take(self) -> StageSeconds:
        """Of the batches since the last `take`."""
        seconds, self._seconds = self._seconds, StageSeconds()
        return seconds

    def warning(self, share: float, seconds: Sequence[float]) -> str | None:
        """A sentence about the stage to blame, if training waited for data for this `share` of the time.

        seconds: of each stage, over all processes. None if training waited little, and from the second time on.
        """
        if share < WARN_FROM or sum(seconds) == 0 or self._warned:
            return None
        self._warned = True
        shares = {name: part / sum(seconds) for name, part in zip(StageSeconds._fields, seconds, strict=True)}
        slowest = max(shares, key=lambda name: shares[name])
        parts = ", ".join(f"{name} {100 * part:.0f} %" for name, part in shares.items())
        cores = cores_here() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of each rank
        remedy = _REMEDIES[slowest]
        if self._num_workers < cores:
            workers = f"data.num_workers ({self._num_workers}; cores per rank: {cores})"
            remedy = f"first raise {workers}; if that does not help, {remedy}"
        return f"training waited for data {100 * share:.0f} % of the time, mostly for {slowest} ({parts}); {remedy}"
