"""Photos of the shards that are measured on."""

from collections.abc import Iterator, Sequence

from benchmarks.data_loading.variants import IMAGE_KEYS
from fastvit_engine.data.shards.archive import read_shard


def read_photos(shards: Sequence[str], most: int) -> list[bytes]:
    """The first JPEG files."""
    found: list[bytes] = []
    for data in _jpegs(shards):
        found.append(data)
        if len(found) == most:
            break
    return found


def _jpegs(shards: Sequence[str]) -> Iterator[bytes]:
    for shard in shards:
        for sample in read_shard(shard):
            data = next((sample[name] for name in IMAGE_KEYS.split(";") if name in sample), b"")
            if data[:2] == b"\xff\xd8":
                yield data
