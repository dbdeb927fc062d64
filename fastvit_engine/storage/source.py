"""What every source of remote bytes offers, and how it says that a read failed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

MAY_PASS = {408, 425, 429}  # HTTP statuses below 500 that are worth another attempt


@dataclass
class Reply:
    """What a server has begun to send for [start, stop) of a shard."""

    offset: int  # position of the first byte: start, or 0 where the server ignores ranges
    size: int | None  # of the whole shard, where the server says it
    version: str | None  # changes when the shard does, where the server says it
    pieces: Iterator[bytes]


class Source(Protocol):
    def open(self, url: str, start: int, stop: int, timeout: float) -> AbstractContextManager[Reply]:
        """Asks for bytes [start, stop). It and iterating over the pieces raise AttemptFailed or Refused only."""


class AttemptFailed(Exception):
    """Something that may pass: a broken connection, a timeout, an overloaded server."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after  # seconds that the server asks to wait


class Refused(Exception):
    """Something that trying again does not change: the shard is not there, or access is denied."""
