"""Errors of shards, for users and for the threads of the storage."""

from typing import Any

from fastvit_engine.errors import UserError
from fastvit_engine.shown import public_url


class StaleIndex(UserError):
    """The shard does not match the index."""

    def __init__(self, url: str, what: str) -> None:
        self._arguments = public_url(url), what
        super().__init__(
            f"shard {public_url(url)} {what}: restore the shard, or make the index again with "
            "`fastvit data index SHARDS --out FILE.index`"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments  # what pickle makes it from; by default, the message alone


class GaveUp(UserError):
    """The shard could not be read for now; later attempts may succeed."""
