"""The protocol of sources of remote bytes, and the errors of a failed read."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from fastvit_engine.shown import shown

MAY_PASS = {408, 425, 429}  # HTTP statuses below 500 that are worth another attempt


@dataclass
class Reply:
    """The response of a server to a request for [start, stop) of a shard, or for all from start on."""

    offset: int  # position of the first byte: start, or 0 if the server ignores ranges
    size: int | None  # of the shard, if the server says it
    version: str | None  # changes when the shard does, if the server says it
    chunks: Iterator[bytes]


class Source(Protocol):
    """A kind of server, or store, that shards are read from."""

    def open(self, url: str, start: int, stop: int | None, timeout: float) -> AbstractContextManager[Reply]:
        """Requests bytes [start, stop), up to the end if `stop` is None.

        The call and the iteration over chunks raise only AttemptFailed or Refused.
        """


class AttemptFailed(Exception):
    """A failure that another attempt may cure: a broken connection, a timeout, an overloaded server."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(shown(reason))
        self.retry_after = retry_after  # seconds that the server asks to wait


class Refused(Exception):
    """A failure that no attempt will cure: the shard does not exist, or access is denied."""

    def __init__(self, reason: str) -> None:
        super().__init__(shown(reason))


class Missing(Refused):
    """There is no such object, or no such bucket."""

    def __init__(self, reason: str = "it does not exist") -> None:
        super().__init__(reason)


class Exists(Refused):
    """An object that was to be created exists already."""

    def __init__(self, reason: str = "it exists already") -> None:
        super().__init__(reason)


class Denied(Refused):
    """The store does not let this user in, or has no such object and does not say so."""


class BehindEnd(Refused):
    """The object ends before the range that was asked for."""


def one_line(error: Exception | str) -> str:
    """Returns the first line of an exception's message, fit to be shown, or the name of its class."""
    return shown(next(iter(str(error).splitlines()), "")) or type(error).__name__
