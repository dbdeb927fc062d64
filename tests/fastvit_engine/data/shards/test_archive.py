"""Reading whole shards: plain, compressed, through pipes and from servers; and every kind of damage."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvit_engine.data.shards.archive import DamagedShard, read_shard
from fastvit_engine.data.shards.sample import Ignored, describe_ignored
from fastvit_engine.errors import UserError
from tests.fastvit_engine.storage.fault_server import FaultServer


def _keys(shard: Path) -> list[str]:
    return [sample["__key__"] for sample in read_shard(str(shard))]


@pytest.fixture
def shard(tmp_path: Path, write_tar: Callable, sample_members: Callable) -> Path:
    return write_tar(tmp_path / "one.tar", sample_members(range(6)))


def test_read_shard_gives_samples_in_order(shard, photo):
    samples = list(read_shard(str(shard)))
    assert [sample["__key__"] for sample in samples] == [f"s{n:03d}" for n in range(6)]
    assert samples[4]["jpg"] == photo(4) and samples[4]["cls"] == b"1" and samples[4]["__url__"] == str(shard)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_whatever_its_name(shard, tmp_path, compress):
    packed = tmp_path / "packed.tar"
    packed.write_bytes(compress(shard.read_bytes()))
    assert _keys(packed) == _keys(shard)
    assert [sample["__key__"] for sample in read_shard(f"pipe:cat {packed}")] == _keys(shard)


def test_pipe(shard):
    assert [sample["__key__"] for sample in read_shard(f"pipe:cat {shard}")] == _keys(shard)
    with pytest.raises(DamagedShard, match="is damaged"):
        list(read_shard(f"pipe:head -c 3000 {shard}"))


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_url(s3_bucket, shard, compress):
    s3_bucket.pipe_file("bucket/archive/one.tar", compress(shard.read_bytes()))
    samples = list(read_shard("s3://bucket/archive/one.tar"))
    assert [(s["__key__"], s["jpg"]) for s in samples] == [(s["__key__"], s["jpg"]) for s in read_shard(str(shard))]
    with pytest.raises(UserError, match=r"shard s3://bucket/archive/gone\.tar cannot be read"):
        list(read_shard("s3://bucket/archive/gone.tar"))


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("behaviour", [None, ("no range",), ("chunked",)])
def test_a_web_server_is_asked_once_per_pass(shard, photo, compress, behaviour):
    content = compress(shard.read_bytes())
    with FaultServer({"/one.tar": content}, always={"/one.tar": behaviour}).running() as server:
        samples = list(read_shard(server.url("/one.tar")))
    assert [(s["__key__"], s["jpg"]) for s in samples] == [(s["__key__"], s["jpg"]) for s in read_shard(str(shard))]
    assert server.requests == [("/one.tar", None)]


def test_what_belongs_to_no_sample_is_passed_over_and_counted(tmp_path, write_tar):
    members = [
        ("./d/._a.JPEG", b"mac"),
        ("./d/a.JPEG", b"1"),
        ("./d/a.cls", b"0"),
        ("./d/a.json", b"{}"),
        ("__MACOSX/d/a.jpg", b"mac"),
        ("__MACOSX/d/._a.jpg", b"mac"),
        ("._a.jpg", b"mac"),
        ("README", b"text"),
        ("d/.DS_Store", b"x"),
    ]
    ignored = Ignored()
    (sample,) = read_shard(str(write_tar(tmp_path / "x.tar", members)), ignored)
    assert set(sample) == {"__key__", "__url__", "jpeg", "cls", "json"} and sample["__key__"] == "./d/a"
    text = ", 2 files without a key or an extension ignored, 4 macOS resource files (._*, __MACOSX/) ignored"
    assert describe_ignored(ignored) == text and describe_ignored(Ignored()) == ""


def test_every_truncation_is_an_error(shard):
    whole = shard.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # first byte after the last member
    for length in [
        *range(0, end, 512),
        *range(100, end, 1111),
    ]:  # at block borders, where tarfile is silent, and within
        shard.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"one\.tar is damaged"):
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
    with pytest.raises(UserError, match=r"double\.tar is damaged \(it has the member 'jpg' of sample 'a' twice"):
        _keys(double)
