"""Announces to the storage of remote shards which of them a node will read next."""

from collections.abc import Sequence

import numpy as np

from fastvit_engine.data.shards.index import Index
from fastvit_engine.data.stream.order import Integers, Order
from fastvit_engine.storage import ShardStorage


class ReadAhead:
    """Tells the storage which shards a node will read, the nearest first, for the next two windows of every lane."""

    def __init__(
        self, order: Order, indexes: Sequence[Index], storage: ShardStorage, positions: Integers, batch: int
    ) -> None:
        """`order`: one of its own, since an order remembers the windows it was asked for last.

        `positions`: those of the node's samples within a global batch of `batch` samples.
        """
        self._order, self._storage = order, storage
        self._first_shard = np.cumsum([0, *(len(index.shards) for index in indexes)])
        horizon = 2 * sum(source.lanes * source.window for source in order.sources)
        self._ahead = (np.arange(0, horizon, batch)[:, None] + positions).ravel()
        self._every = max(batch, horizon // 8)
        self._next = 0

    def at(self, start: int) -> None:
        """The step whose positions begin at `start` is about to be read."""
        if start < self._next:
            return
        self._next = start + self._every
        located = self._order.locate(start + self._ahead)
        shards, first_need = np.unique(self._first_shard[located.source] + located.shard, return_index=True)
        self._storage.will_need(shards[np.argsort(first_need)].tolist())
