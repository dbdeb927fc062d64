import gzip
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from fastvit_engine.data.stream.sequential import read_shard, stream_samples
from fastvit_engine.errors import UserError


def _keys(shard: Path) -> list[str]:
    return [sample["__key__"] for sample in read_shard(str(shard))]


@pytest.fixture
def shard(tmp_path: Path, write_tar: Callable, sample_members: Callable) -> Path:
    return write_tar(tmp_path / "one.tar", sample_members(range(6)))


def test_read_shard_gives_samples_in_order(shard, photo):
    samples = list(read_shard(str(shard)))
    assert [sample["__key__"] for sample in samples] == [f"s{n:03d}" for n in range(6)]
    assert samples[4]["jpg"] == photo(4) and samples[4]["cls"] == b"1" and samples[4]["__url__"] == str(shard)


def test_read_shard_gzipped_and_through_a_pipe(shard, tmp_path):
    packed = tmp_path / "one.tar.gz"
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    assert _keys(packed) == _keys(shard)
    assert [sample["__key__"] for sample in read_shard(f"pipe:cat {shard}")] == _keys(shard)


def test_upper_case_and_other_members(tmp_path, write_tar):
    members = [("./d/a.JPEG", b"1"), ("./d/a.cls", b"0"), ("./d/a.json", b"{}"), ("._a.jpg", b"mac")]
    (sample,) = read_shard(str(write_tar(tmp_path / "x.tar", members)))
    assert set(sample) == {"__key__", "__url__", "jpeg", "cls", "json"}


def test_every_truncation_is_an_error(shard):
    whole = shard.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # first byte after the last member
    for length in [
        *range(0, end, 512),
        *range(100, end, 1111),
    ]:  # at block borders, where tarfile is silent, and within
        shard.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"one\.tar is damaged or unreadable"):
            _keys(shard)


@pytest.mark.parametrize("filler", [b"\xa5", b"\0"], ids=["garbage", "zeros"])
def test_damaged_header_in_the_middle_is_an_error(shard, filler):
    whole = bytearray(shard.read_bytes())
    start = whole.index(b"s003.jpg")
    whole[start : start + 512] = filler * 512
    shard.write_bytes(whole)
    with pytest.raises(UserError, match=r"one\.tar is damaged"):
        _keys(shard)


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_gzip_is_an_error(shard, tmp_path, damage):
    packed = bytearray(gzip.compress(shard.read_bytes()))
    if damage == "truncate":
        packed = packed[: len(packed) * 2 // 3]
    else:
        packed[len(packed) // 2 : len(packed) // 2 + 50] = b"\xff" * 50
    path = tmp_path / "bad.tar.gz"
    path.write_bytes(packed)
    with pytest.raises(UserError, match=r"bad\.tar\.gz is damaged"):
        _keys(path)


def test_not_a_tar_missing_file_and_double_member(tmp_path, write_tar):
    page = tmp_path / "page.tar"
    page.write_text("<html>not found</html>" * 100)
    with pytest.raises(UserError, match=r"page\.tar is damaged"):
        _keys(page)
    with pytest.raises(UserError, match="No such file"):
        _keys(tmp_path / "gone.tar")
    double = write_tar(tmp_path / "double.tar", [("a.jpg", b"1"), ("a.jpg", b"2")])
    with pytest.raises(UserError, match=r"double\.tar .*duplicate"):
        _keys(double)


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


def test_stream_without_samples(tmp_path, write_tar):
    empty = write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(UserError, match=r"empty\.tar hold no samples"):
        next(stream_samples([str(empty)], seed=0, stream=0, shuffle_buffer=4))
