"""Errors of shards, for users and for the threads of the storage."""

from typing import Any

from fastvit_engine.errors import UserError
from fastvit_engine.shown import public_url


class StaleIndex(UserError):
    """The shard is not what the caller of the storage knows of it."""

    def __init__(self, url: str, what: str, remedy: str = "run the same command again") -> None:
        self._arguments = public_url(url), what, remedy
        super().__init__(f"shard {public_url(url)} {what}: {remedy}")

    def advising(self, remedy: str) -> "StaleIndex":
        """The same error with another remedy."""
        return StaleIndex(*self._arguments[:2], remedy)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments  # what pickle makes it from; by default, the message alone


class GaveUp(UserError):
    """The shard could not be read for now; later attempts may succeed."""
