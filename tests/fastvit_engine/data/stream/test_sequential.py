"""The endless shuffled stream of samples of a group of shards."""

from itertools import islice
from pathlib import Path

import pytest

from fastvit_engine.data.stream.sequential import stream_samples
from fastvit_engine.errors import UserError


def _stream(shards: Path, count: int, **changes) -> list[tuple[int, str]]:
    arguments = {"seed": 0, "stream": 0, "shuffle_buffer": 4} | changes
    samples = stream_samples(sorted(map(str, shards.iterdir())), **arguments)
    return [(index, sample["__key__"]) for index, sample in islice(samples, count)]


def test_stream_epochs_hold_every_sample_once_in_different_orders(gzipped_shards):
    pairs = _stream(gzipped_shards, 3 * 35)
    assert [index for index, _ in pairs] == list(range(105))
    epochs = [[key for _, key in pairs[start : start + 35]] for start in (0, 35, 70)]
    for epoch in epochs:
        assert sorted(epoch) == [f"s{n:03d}" for n in range(35)]
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_stream_depends_on_seed_and_stream_only(gzipped_shards):
    assert _stream(gzipped_shards, 50) == _stream(gzipped_shards, 50)
    assert _stream(gzipped_shards, 35) != _stream(gzipped_shards, 35, seed=1)
    assert _stream(gzipped_shards, 35) != _stream(gzipped_shards, 35, stream=1)


@pytest.mark.parametrize("buffer", [1, 4, 1000])
@pytest.mark.parametrize("first", [0, 1, 34, 35, 36, 69, 70, 100, 35 * 7 + 3])
def test_stream_from_a_later_sample_continues_exactly(gzipped_shards, first, buffer):
    whole = _stream(gzipped_shards, first + 40, shuffle_buffer=buffer)
    assert _stream(gzipped_shards, 40, first=first, shuffle_buffer=buffer) == whole[first:]


def test_late_start_reads_at_most_two_epochs(gzipped_shards, monkeypatch):
    opened = []
    import fastvit_engine.data.stream.sequential as module

    real = module.read_shard
    monkeypatch.setattr(module, "read_shard", lambda shard: opened.append(shard) or real(shard))
    assert _stream(gzipped_shards, 1, first=35 * 1000 + 34)[0][0] == 35 * 1000 + 34
    assert len(opened) == 14


def test_large_buffer_mixes_shards(gzipped_shards):
    first = {key for _, key in _stream(gzipped_shards, 12, shuffle_buffer=1000)}
    runs = [{f"s{n:03d}" for n in range(a, b)} for a, b in ((0, 5), (5, 8), (8, 16), (16, 22), (22, 23), (23, 28))]
    assert sum(bool(first & run) for run in runs) >= 3


def test_each_epoch_reads_the_shards_in_another_order(gzipped_shards):
    """Also without a buffer, which keeps the order within a shard."""
    pairs = _stream(gzipped_shards, 8 * 35, shuffle_buffer=1)
    epochs = [[key for _, key in pairs[start : start + 35]] for start in range(0, 8 * 35, 35)]
    first = {epoch[0] for epoch in epochs}
    assert len(first) > 2
    for epoch in epochs:
        jumps = sum(int(after[1:]) != int(before[1:]) + 1 for before, after in zip(epoch, epoch[1:], strict=False))
        assert 0 < jumps < 7  # whole shards, of which there are seven


def test_stream_without_samples(tmp_path, write_tar):
    empty = write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(UserError, match=r"empty\.tar hold no samples"):
        next(stream_samples([str(empty)], seed=0, stream=0, shuffle_buffer=4))
