"""Shards in object stores, as a source for `remote.fetch`, which does the retries."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastvit_engine.storage.source import Reply
from fastvit_engine.storage.stores import Store, open_store


class StoreSource:
    """Reads by range, each with one request that also tells the size and the version of the object."""

    def __init__(self) -> None:
        self._opened: dict[tuple[str, float], tuple[Store, str]] = {}

    @contextmanager
    def open(self, url: str, start: int, stop: int | None, timeout: float) -> Iterator[Reply]:
        if (url, timeout) not in self._opened:
            # `fetch` tries again; it knows what it has, counts attempts, and can be cancelled between them.
            self._opened[url, timeout] = open_store(url, timeout=timeout, retries=0)
        store, key = self._opened[url, timeout]
        reply = store.open(key, start, stop)
        try:
            yield reply
        finally:
            close: Any = getattr(reply.chunks, "close", None)
            if close is not None:
                close()
