"""Reads remote shards with retries, and raises one error if a shard cannot be read."""

import logging
import random
import re
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

from fastvit_engine.errors import UserError
from fastvit_engine.shown import public_url
from fastvit_engine.storage.errors import GaveUp, StaleIndex
from fastvit_engine.storage.http import HttpSource
from fastvit_engine.storage.object_store import StoreSource
from fastvit_engine.storage.source import AttemptFailed, Refused, Source
from fastvit_engine.storage.stores import open_store

log = logging.getLogger(__name__)

BACKOFF_S = 0.5  # mean of the first pause is half of it; doubles with every failure in a row
MAX_BACKOFF_S = 30.0
_NO_ACCESS = re.compile(r"HTTP 40[13]\b")
SLOWEST = 2**20  # bytes per second: a transfer may take this much longer than TryPolicy.patience

Write = Callable[[int, bytes | memoryview], None]  # (position in the shard, bytes)


@dataclass(frozen=True)
class TryPolicy:
    """How long, and how often, a read of a remote shard is tried."""

    retries: int  # consecutive attempts after the first that may fail without a new byte
    timeout: float  # seconds without a byte after which an attempt has failed
    patience: float  # seconds in all, besides the time that the bytes take at SLOWEST


class Cancelled(Exception):
    """The bytes are no longer needed."""


def open_source(url: str) -> Source:
    """Returns the source that reads URLs of this scheme; raises UserError if a package for it is missing."""
    if url.startswith("pipe:"):
        raise UserError(f"shard {url} is a command, which cannot be read by position: give a path or a URL")
    if url.startswith(("http://", "https://")):
        return HttpSource()
    open_store(url)  # raises UserError if the scheme is unknown, or obstore is missing
    return StoreSource()


def refusal(url: str, error: Refused) -> UserError:
    """The error for a shard that its server does not give."""
    remedy = "correct its URL, or restore it"
    if _NO_ACCESS.match(str(error)) and public_url(url) == url:
        remedy = (
            "give user name and password, or the signature, in the URLs of data.train or data.eval; an index keeps "
            "neither, so set data.index to it"
        )
    return UserError(f"shard {public_url(url)} cannot be read ({error}): {remedy}")


def describe(url: str, policy: TryPolicy) -> tuple[int, str]:
    """Returns (bytes, version or "") of a remote shard. UserError if it cannot be read, GaveUp if not for now."""
    source, failures = open_source(url), 0
    while True:
        try:
            with source.open(url, 0, 1, policy.timeout) as reply:
                if reply.size is None:
                    raise UserError(
                        f"the server of shard {public_url(url)} does not say how long it is: copy the shard"
                    )
                return reply.size, reply.version or ""
        except Refused as error:
            raise refusal(url, error) from error
        except AttemptFailed as error:
            failures += 1
            if failures > policy.retries:
                raise GaveUp(
                    f"shard {public_url(url)} could not be read ({error}; attempt {failures} was the last): "
                    "check the server and the network, then try again"
                ) from error
            _sleep(max(random.uniform(0, min(BACKOFF_S * 2 ** (failures - 1), MAX_BACKOFF_S)), error.retry_after))


def fetch(
    source: Source,
    url: str,
    size: int,
    start: int,
    stop: int,
    write: Write,
    policy: TryPolicy,
    on_retry: Callable[[str, str], None],
    cancelled: Callable[[], bool] = lambda: False,
) -> int:
    """Passes bytes [start, stop) of the shard to `write` in order; returns how many before `start` the server sent too.

    A broken transfer resumes where it stopped, or from the start if the shard has changed. Raises StaleIndex if the
    server gives another size, UserError if it refuses, GaveUp if the limits of the policy are reached, Cancelled.
    """
    deadline = time.monotonic() + policy.patience + (stop - start) / SLOWEST
    done, version, attempts, failures, skipped = start, None, 0, 0, 0
    while done < stop:
        before, attempts = done, attempts + 1
        try:
            with source.open(url, done, stop, policy.timeout) as reply:
                if reply.size is not None and reply.size != size:
                    raise StaleIndex(url, f"has {reply.size} bytes instead of {size}")
                if done > start and reply.version != version:
                    done = start
                version, position = reply.version, reply.offset
                if position > done:
                    raise AttemptFailed("the shard changed between two attempts")
                skipped += done - position
                deadline += (done - position) / SLOWEST
                for chunk in reply.chunks:
                    if cancelled():
                        raise Cancelled
                    new = memoryview(chunk)[max(done - position, 0) : stop - position]
                    position += len(chunk)
                    if new:
                        write(done, new)
                        done += len(new)
                    if done >= stop:
                        return skipped
                    if time.monotonic() > deadline:
                        raise AttemptFailed("it comes too slowly")
                raise AttemptFailed(f"the connection closed {stop - done} bytes before the end")
        except Refused as error:
            raise refusal(url, error) from error
        except AttemptFailed as error:
            failures = 1 if done > before else failures + 1
            if failures > policy.retries or time.monotonic() >= deadline:
                raise GaveUp(
                    f"shard {public_url(url)} could not be read ({error}; attempt {attempts} was the last): "
                    "check the server and the network, then resume"
                ) from error
            on_retry(url, str(error))
            pause = random.uniform(0, min(BACKOFF_S * 2 ** (failures - 1), MAX_BACKOFF_S))
            _sleep(min(max(pause, error.retry_after), deadline - time.monotonic()), cancelled)
    return skipped


def stream_bytes(url: str, policy: TryPolicy) -> Generator[bytes]:
    """All bytes of a remote shard, from beginning to end, with one request for as long as its connection holds.

    The server need not know ranges or lengths. A broken transfer resumes where it stopped. Raises UserError if the
    server refuses, or if the shard changes meanwhile, and GaveUp if `policy.retries` attempts in a row bring nothing.
    `policy.patience` does not apply: whoever consumes the bytes sets the pace.
    """
    source, done, size, version, attempts, failures = open_source(url), 0, None, None, 0, 0
    while True:
        before, attempts = done, attempts + 1
        try:
            with source.open(url, done, None, policy.timeout) as reply:
                if _differ(size, reply.size) or _differ(version, reply.version):
                    raise UserError(f"shard {public_url(url)} changed while it was being read: start again")
                size, version, position = size or reply.size, version or reply.version, reply.offset
                for chunk in reply.chunks:
                    new = chunk[max(done - position, 0) :]  # a server without ranges begins anew
                    position += len(chunk)
                    if new:
                        done += len(new)
                        yield new
            if size is None or done >= size:
                return
            raise AttemptFailed(f"the connection closed {size - done} bytes before the end")
        except Refused as error:
            raise refusal(url, error) from error
        except AttemptFailed as error:
            failures = 1 if done > before else failures + 1
            if failures > policy.retries:
                raise GaveUp(
                    f"shard {public_url(url)} could not be read ({error}; attempt {attempts} was the last): "
                    "check the server and the network, then resume"
                ) from error
            log.info("shard %s: %s; trying again", public_url(url), error)
            pause = random.uniform(0, min(BACKOFF_S * 2 ** (failures - 1), MAX_BACKOFF_S))
            _sleep(max(pause, error.retry_after))


def _differ(before: object, now: object) -> bool:
    return before is not None and now is not None and before != now


def _sleep(seconds: float, cancelled: Callable[[], bool] = lambda: False) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if cancelled():
            raise Cancelled
        time.sleep(min(left, 0.1))
