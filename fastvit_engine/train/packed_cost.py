"""What steps with images of different sizes compute: their tokens, and the operations that these really took."""

from collections.abc import Iterable
from functools import cache

import numpy as np

from fastvit_engine.config import Config
from fastvit_engine.config.model_shape import resolve_shape
from fastvit_engine.data import Batch
from fastvit_engine.models import packed_flops
from fastvit_engine.packed_image import read_grids


class PackedCost:
    """Adds up the operations of this process's images between two logged steps."""

    def __init__(self, config: Config, flops: int = 0) -> None:
        """flops: of steps before, since the last logged one."""
        self._prefix = resolve_shape(config.model).prefix
        self._flops_of = cache(lambda patches: packed_flops(config, patches))
        self._flops = flops

    def add(self, batches: Iterable[Batch]) -> None:
        """These were computed."""
        patches, counts = np.unique(_patches(batches), return_counts=True)
        self._flops += sum(
            self._flops_of(n) * count for n, count in zip(patches.tolist(), counts.tolist(), strict=True)
        )

    def take(self) -> int:
        """Operations, forward and backward, since the last time."""
        flops, self._flops = self._flops, 0
        return flops

    @property
    def untaken(self) -> int:
        """What `take` would return."""
        return int(self._flops)

    def tokens(self, batches: Iterable[Batch]) -> int:
        """Of all images, with what comes before their patches: a function of the samples, however they are split."""
        patches = _patches(batches)
        return int(patches.sum()) + self._prefix * len(patches)


def _patches(batches: Iterable[Batch]) -> np.ndarray:
    """Of each image, int64 [images]; padding is left out, and a bad sample is one black patch."""
    found = [read_grids(batch.images).prod(axis=1)[[bool(key) for key in batch.keys]] for batch in batches]
    return np.concatenate([np.empty(0, np.int64), *found])
