"""Reading pieces of shards that lie on a local or mounted disk."""

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from io import FileIO
from typing import Any

from fastvit_engine.errors import UserError

_OPEN_FILES = 256  # of each process


class LocalShards:
    """Bytes of numbered shards; for any number of threads, and for processes that are forked or sent a copy."""

    def __init__(self, paths: Sequence[str], sizes: Sequence[int]) -> None:
        self._paths, self._sizes = paths, sizes
        self._file = lru_cache(_OPEN_FILES)(self._open)  # a file that falls out is closed when its last reader is done

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """`length` bytes of a shard from byte `offset` on; UserError naming the shard where it does not have them."""
        try:
            content = os.pread(self._file(shard).fileno(), length, offset)
        except OSError as error:
            raise UserError(
                f"shard {self._paths[shard]} cannot be read ({error.strerror}): copy it there again"
            ) from error
        if len(content) < length:
            raise UserError(
                f"shard {self._paths[shard]} ends before byte {offset + length:,}, and had {self._sizes[shard]:,} when "
                "it was indexed: copy it again, or index the changed shards with `fastvit data index`"
            )
        return content

    def will_need(self, shards: Iterable[int]) -> None:
        """Nothing to be done: the shards are here."""

    def _open(self, shard: int) -> FileIO:
        return FileIO(self._paths[shard])

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self._paths, "sizes": self._sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
