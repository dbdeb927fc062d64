"""The endless shuffled stream of samples that a group of shards gives, read from beginning to end."""

import random
from collections.abc import Iterator

from webdataset.filters import shuffle

from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.data.shards.sample import Sample
from fastvit_engine.errors import UserError


def stream_samples(
    shards: list[str], *, seed: int, stream: int, shuffle_buffer: int, first: int = 0
) -> Iterator[tuple[int, Sample]]:
    """Endless (index in the stream, sample) pairs from index `first` on; the order depends only on the arguments.

    Each epoch permutes the stream's shards and shuffles their samples through a buffer of `shuffle_buffer` samples,
    both seeded by (seed, stream, epoch). Samples before `first` are read and dropped: at most the stream's first epoch
    (which tells its length, the same in every epoch) and the part of the epoch that `first` falls into.
    """
    epoch, start = 0, 0
    while True:
        length = 0
        for sample in _read_epoch(shards, random.Random(f"{seed}/{stream}/{epoch}"), shuffle_buffer):
            if start + length >= first:
                yield start + length, sample
            length += 1
        if length == 0:
            raise UserError(f"the shards {', '.join(shards)} hold no samples: remove them from data.train")
        epochs = max(1, (first - start) // length)  # whole epochs before `first` need not be read
        epoch += epochs
        start += epochs * length


def _read_epoch(shards: list[str], rng: random.Random, shuffle_buffer: int) -> Iterator[Sample]:
    order = rng.sample(shards, len(shards))
    samples = (sample for shard in order for sample in read_shard(shard))
    return shuffle(shuffle_buffer, initial=shuffle_buffer, rng=rng)(samples)
