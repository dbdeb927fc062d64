"""Background threads that download whole shards into the cache."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from fastvit_engine.errors import UserError
from fastvit_engine.storage.cache import Download, NoRoom, Present, ShardCache
from fastvit_engine.storage.errors import GaveUp
from fastvit_engine.storage.remote import Cancelled, Write

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 0.02  # interval of checks whether another process has finished a shard
NO_ROOM_PAUSE_S = 2.0  # before another try to get space in a cache full of shards in use
BROKEN_PAUSE_S = 60.0  # before another try to use a folder that is full or gone


class Downloads:
    """Downloads the shards that reads have missed first, then those that will be needed, in order.

    Threads start when there is work, end when there is none, and die with the process.
    """

    def __init__(
        self,
        cache: ShardCache,
        name_of: Callable[[int], str],
        sizes: Sequence[int],
        download: Callable[[int, Write, Callable[[], bool]], None],  # (shard, write, cancelled); raises UserError
        threads: int,
    ) -> None:
        self._cache, self._name_of, self._sizes, self._download = cache, name_of, sizes, download
        self._most_threads = threads
        self._lock = threading.Lock()  # guards all that follows
        self._threads = 0
        self._plan: dict[int, int] = {}  # shard -> position in the plan
        self._plan_names: frozenset[str] = frozenset()
        self._missed: dict[int, _Missed] = {}
        self._misses = 0
        self._queued: set[int] = set()
        self._active: set[int] = set()
        self._failed: dict[int, Exception] = {}  # for good
        self._full_until = 0.0  # no room for shards outside the plan
        self._broken_until = 0.0
        self._told_broken = False

    def request(self, shard: int) -> threading.Event | None:
        """Requests a shard that a read has missed; returns an event for its end, or None if it cannot be had now."""
        with self._lock:
            if not self._fits(shard) or shard in self._failed:
                return None
            if time.monotonic() < max(self._full_until, self._broken_until):
                return None
            if shard not in self._missed:
                self._misses += 1
                self._missed[shard] = _Missed(self._misses, threading.Event())
                if shard not in self._active:
                    self._queued.add(shard)
                self._start_threads()
            return self._missed[shard].ended

    def plan(self, shards: Iterable[int]) -> None:
        """Replaces the plan with as many of `shards` as the cache holds; cancels what only the old plan wanted."""
        plan: dict[int, int] = {}
        room = self._cache.limit
        for shard in dict.fromkeys(shards):
            if not self._fits(shard) or shard in self._failed:
                continue
            if room is not None and (room := room - self._sizes[shard]) < 0:
                break
            plan[shard] = len(plan)
        try:
            absent = {shard for shard in plan if not self._cache.touch(self._name_of(shard), self._sizes[shard])}
        except OSError as error:
            self.broken(error)
            absent = set()
        with self._lock:
            self._plan, self._plan_names = plan, frozenset(map(self._name_of, plan))
            if time.monotonic() >= self._broken_until:
                self._queued = (absent | self._missed.keys()) - self._active
                self._start_threads()

    def cancel(self) -> None:
        """Cancels all downloads, including those requested by reads."""
        with self._lock:
            self._plan, self._plan_names = {}, frozenset()
            self._queued.clear()
            self._end_missed()

    def raise_failure(self, shard: int) -> None:
        """Raises the permanent error that a thread has found with the shard, if any."""
        error = self._failed.get(shard)
        if isinstance(error, UserError):
            raise UserError(str(error)) from error
        if error is not None:
            raise RuntimeError(f"the download of shard {shard} failed") from error

    def broken(self, error: OSError) -> None:
        """Stops using the cache folder for a while: reads bypass it for what it does not have."""
        with self._lock:
            self._broken_until = time.monotonic() + BROKEN_PAUSE_S
            self._queued.clear()
            self._end_missed()
            told, self._told_broken = self._told_broken, True
        if not told:
            log.warning(
                "the shard cache folder %s cannot take shards (%s): reads bypass it, which is slower; make room there "
                "or lower the limit of the cache",
                self._cache.folder,
                error.strerror or error,
            )

    def _fits(self, shard: int) -> bool:
        return self._cache.limit is None or self._sizes[shard] <= self._cache.limit

    def _end_missed(self) -> None:
        for missed in self._missed.values():
            missed.ended.set()
        self._missed.clear()

    def _start_threads(self) -> None:
        while self._threads < min(self._most_threads, len(self._queued) + len(self._active)):
            self._threads += 1
            threading.Thread(target=self._run, name="shard download", daemon=True).start()

    def _run(self) -> None:
        while (shard := self._next()) is not None:
            try:
                has_room = self._fetch(shard)
            except Cancelled:
                has_room = True
            except GaveUp as error:  # the read that needs it tries again, and raises
                log.warning("%s", error)
                has_room = True
            except OSError as error:  # of the folder: the network's are UserErrors here
                self.broken(error)
                has_room = True
            except Exception as error:
                self._failed[shard] = error
                has_room = True
            self._finish(shard, again=not has_room)
            if not has_room:
                time.sleep(NO_ROOM_PAUSE_S)

    def _next(self) -> int | None:
        """Returns the most urgent shard; None, after counting this thread out, if there is none."""
        with self._lock:
            if not self._queued:
                self._threads -= 1
                return None
            shard = min(self._queued, key=self._urgency)
            self._queued.remove(shard)
            self._active.add(shard)
            return shard

    def _urgency(self, shard: int) -> tuple[int, int]:
        missed = self._missed.get(shard)
        return (0, missed.number) if missed else (1, self._plan[shard])

    def _finish(self, shard: int, *, again: bool) -> None:
        with self._lock:
            self._active.discard(shard)
            missed = self._missed.pop(shard, None)
            if missed:
                missed.ended.set()
            if again:
                self._full_until = time.monotonic() + NO_ROOM_PAUSE_S
                if shard in self._plan:
                    self._queued.add(shard)

    def _fetch(self, shard: int) -> bool:
        """Brings the shard into the cache; returns False if the cache has no space for it now."""
        while not self._is_unwanted(shard):
            state = self._cache.begin(self._name_of(shard), self._sizes[shard], self._plan_names)
            if isinstance(state, Download):
                try:
                    self._download(shard, state.write, lambda: self._is_unwanted(shard))
                    state.publish()
                except BaseException:
                    state.discard()
                    raise
                return True
            if isinstance(state, Present):
                return True
            if isinstance(state, NoRoom):
                return False
            while not state.is_over() and not self._is_unwanted(shard):
                time.sleep(LOOK_AGAIN_S)
        return True

    def _is_unwanted(self, shard: int) -> bool:
        return shard not in self._missed and shard not in self._plan


class _Missed(NamedTuple):
    number: int  # counts up: the oldest is served first
    ended: threading.Event
