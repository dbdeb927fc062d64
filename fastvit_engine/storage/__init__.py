"""Reads bytes of shards by position, from local disks, web servers and object stores.

`ShardStorage.read` is all that a reader of samples needs. Local shards are read from their files (local.py). Remote
shards are read from web servers (http.py) or object stores (object_store.py), with retries (remote.py) and many at a
time (together.py); with a cache folder they are downloaded whole (cache.py), by background threads that a missed read
or a read-ahead hint starts (downloads.py). stores.py is for all else that is done with object stores.
"""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastvit_engine.shown import public_url
from fastvit_engine.storage.cache import ShardCache, cache_name
from fastvit_engine.storage.downloads import Downloads
from fastvit_engine.storage.errors import StaleIndex
from fastvit_engine.storage.local import LocalFiles, local_path
from fastvit_engine.storage.remote import Source, TryPolicy, Write, fetch, open_source
from fastvit_engine.storage.together import read_together

__all__ = ["Counters", "ShardStorage"]

log = logging.getLogger(__name__)

_READS_AT_ONCE = 16  # of a batch, in one process


@dataclass
class Counters:
    """What one process has read since it started, or since it was forked."""

    reads: int = 0
    bytes: int = 0  # that reads returned
    downloaded: int = 0  # bytes that came over the network, by range or with whole shards
    retries: int = 0  # failed attempts that were tried again
    cache_hits: int = 0  # reads whose shard lay in the cache
    cache_misses: int = 0  # reads that waited for their shard or bypassed the cache
    seconds: float = 0.0  # spent in read()


class ShardStorage:
    """Reads byte ranges of shards: local paths, file://, http(s)://, s3://, gs:// and az://.

    Threads may share one. It may be pickled, and a forked process may keep using it: connections, threads and counters
    belong to a process and are created again there; all processes of a node share the cache folder.

    urls: the shards, in the order in which `read` and `will_need` number them.
    sizes: bytes of each, from the index; a shard of another size is an error, not other data.
    cache_dir: folder on a local disk that remote shards are downloaded into; None: every read goes to the server.
    cache_bytes: limit of the shards in it together; None: no limit.
    retries: consecutive attempts after the first that may fail without a new byte.
    timeout: seconds without a byte after which an attempt has failed.
    patience: seconds after which a read has failed, whatever the number of attempts (slow transfers have longer).
    wait: seconds that a read waits for its shard to be downloaded before it asks the server for its byte range only.
    threads: number of shards that one process downloads at a time.
    remedies: for each shard, what errors advise if it has another size; None: to run the same command again.
    """

    def __init__(
        self,
        urls: Sequence[str],
        sizes: Sequence[int],
        *,
        cache_dir: Path | None = None,
        cache_bytes: int | None = None,
        retries: int = 10,
        timeout: float = 30.0,
        patience: float = 300.0,
        wait: float = 5.0,
        threads: int = 8,
        remedies: Sequence[str] | None = None,
    ) -> None:
        if len(urls) != len(sizes):
            raise ValueError(f"{len(urls)} urls but {len(sizes)} sizes")
        self._urls, self._sizes = list(urls), list(sizes)
        self._paths = [local_path(url) for url in self._urls]  # None: remote
        self._cache_dir, self._cache_bytes = cache_dir, cache_bytes
        self._policy = TryPolicy(retries, timeout, patience)
        self._wait, self._threads = wait, threads
        self._remedies = remedies
        self._start()
        if self._cache is not None:
            self._cache.prepare()

    def _start(self) -> None:
        """Creates everything that belongs to one process; uses no file and no network."""
        self._count_lock, self._counters = threading.Lock(), Counters()
        self._local = LocalFiles()
        self._sources: dict[str, Source] = {}
        self._no_wait_until = 0.0
        self._told_no_ranges = False
        self._readers: ThreadPoolExecutor | None = None
        self._cache: ShardCache | None = None
        if self._cache_dir is not None and None in self._paths:
            self._cache = ShardCache(self._cache_dir, self._cache_bytes)
            self._downloads = Downloads(self._cache, self._name_of, self._sizes, self._download, self._threads)
        _storages.add(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = "_urls", "_sizes", "_paths", "_cache_dir", "_cache_bytes", "_policy", "_wait", "_threads", "_remedies"
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()
        if self._cache is not None:
            self._cache.prepare()

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Returns `length` bytes of a shard from `offset` on.

        Raises UserError naming the shard if it is gone, not readable, or of another size than the index says, or if its
        server has not answered within the limits given to the constructor.
        """
        started = time.perf_counter()
        path = self._paths[shard]
        try:
            self._check(shard, offset, length)
            if path is not None:
                data = self._local.read(path, self._sizes[shard], offset, length)
            elif self._cache is not None:
                data = self._read_through_cache(self._cache, shard, offset, length)
            else:
                data = self._read_range(shard, offset, length)
        except StaleIndex as error:
            raise self._advising(error, shard) from error.__cause__
        self._count_read(length, started)
        return data

    def read_many(self, ranges: Sequence[tuple[int, int, int]]) -> Iterator[bytes]:
        """The bytes of each (shard, offset, length), in order; raises as `read` does, when it is their turn.

        Ranges that come straight from servers are read ahead, several at a time, and neighbours with one request.
        """
        direct = self._cache is None and any(self._paths[shard] is None for shard, _, _ in ranges)
        if not direct or len(ranges) < 2:
            for one in ranges:
                yield self.read(*one)
            return
        for one in ranges:
            try:
                self._check(*one)
            except StaleIndex as error:
                raise self._advising(error, one[0]) from error.__cause__
        with self._count_lock:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(_READS_AT_ONCE, "shard read")
        contents = read_together(ranges, self._read_directly, self._readers)
        try:
            for shard, _, _ in ranges:
                started = time.perf_counter()
                try:
                    data = next(contents)
                except StaleIndex as error:
                    raise self._advising(error, shard) from error.__cause__
                self._count_read(len(data), started)
                yield data
        finally:
            contents.close()

    def _read_directly(self, shard: int, offset: int, length: int) -> bytes:
        path = self._paths[shard]
        if path is not None:
            return self._local.read(path, self._sizes[shard], offset, length)
        return self._read_range(shard, offset, length)

    def _advising(self, error: StaleIndex, shard: int) -> StaleIndex:
        return error if self._remedies is None else error.advising(self._remedies[shard])

    def _check(self, shard: int, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._sizes[shard]:
            raise StaleIndex(
                self._urls[shard], f"has {self._sizes[shard]} bytes, but bytes {offset} to {offset + length} are asked"
            )

    def will_need(self, shards: Iterable[int]) -> None:
        """Announces which shards will be read, the next first; replaces the announcement before.

        As many of them as the cache holds are downloaded in that order, and kept until another call no longer names
        them. If a shard is gone for good, the read that needs it reports that. Meant for one process of a node; it does
        nothing for local shards or without a cache.
        """
        if self._cache is not None:
            self._downloads.plan(shard for shard in shards if self._paths[shard] is None)

    def close(self) -> None:
        """Stops the background downloads; reads still work."""
        if self._cache is not None:
            self._downloads.cancel()

    def counters(self) -> Counters:
        with self._count_lock:
            return replace(self._counters)

    def _read_through_cache(self, cache: ShardCache, shard: int, offset: int, length: int) -> bytes:
        data = self._from_cache(cache, shard, offset, length)
        if data is not None:
            self._count(cache_hits=1)
            return data
        self._count(cache_misses=1)
        arrived = self._downloads.request(shard)
        # After a wait without success, nine tenths of the time no read waits: with a cold cache, shards arrive slowly.
        if arrived is not None and time.monotonic() >= self._no_wait_until:
            if not arrived.wait(self._wait):
                self._no_wait_until = time.monotonic() + 10 * self._wait
            data = self._from_cache(cache, shard, offset, length)
        self._downloads.raise_failure(shard)
        return self._read_range(shard, offset, length) if data is None else data

    def _from_cache(self, cache: ShardCache, shard: int, offset: int, length: int) -> bytes | None:
        try:
            return cache.read(self._name_of(shard), self._sizes[shard], offset, length)
        except OSError as error:
            self._downloads.broken(error)
            return None

    def _read_range(self, shard: int, offset: int, length: int) -> bytes:
        data = bytearray(length)

        def write(position: int, chunk: bytes | memoryview) -> None:
            data[position - offset : position - offset + len(chunk)] = chunk
            self._count(downloaded=len(chunk))

        url, size = self._urls[shard], self._sizes[shard]
        skipped = fetch(self._source(url), url, size, offset, offset + length, write, self._policy, self._on_retry)
        if skipped and not self._told_no_ranges:
            self._told_no_ranges = True
            log.warning(
                "the server of %s ignores Range, so that each sample costs reading its shard up to there: "
                "use a cache folder, or a server with range requests",
                public_url(url),
            )
        return bytes(data)

    def _download(self, shard: int, write: Write, cancelled: Callable[[], bool]) -> None:
        """Passes all bytes of a shard to `write`, for Downloads."""

        def counting_write(position: int, chunk: bytes | memoryview) -> None:
            write(position, chunk)
            self._count(downloaded=len(chunk))

        url, size = self._urls[shard], self._sizes[shard]
        fetch(self._source(url), url, size, 0, size, counting_write, self._policy, self._on_retry, cancelled)

    def _source(self, url: str) -> Source:
        scheme = url.partition("://")[0]
        if scheme not in self._sources:
            self._sources.setdefault(scheme, open_source(url))  # of threads that come together, one wins
        return self._sources[scheme]

    def _name_of(self, shard: int) -> str:
        return cache_name(self._urls[shard], self._sizes[shard])

    def _on_retry(self, url: str, reason: str) -> None:
        log.info("shard %s: %s; trying again", public_url(url), reason)
        self._count(retries=1)

    def _count_read(self, length: int, started: float) -> None:
        with self._count_lock:
            counters = self._counters
            counters.reads += 1
            counters.bytes += length
            counters.seconds += time.perf_counter() - started

    def _count(self, **more: float) -> None:
        with self._count_lock:
            for name, n in more.items():
                setattr(self._counters, name, getattr(self._counters, name) + n)


# A forked child has the parent's sockets and locks but none of its threads: every storage starts again there.
_storages: "weakref.WeakSet[ShardStorage]" = weakref.WeakSet()


def _restart_all() -> None:
    for storage in list(_storages):
        storage._start()


os.register_at_fork(after_in_child=_restart_all)
