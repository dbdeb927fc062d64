"""Shards in object stores: a real client against servers that speak S3."""

import itertools
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from fastvit_engine.data.shards.names import find_shards, list_shards
from fastvit_engine.errors import UserError
from fastvit_engine.storage import ShardStorage, remote, store_calls
from tests.fastvit_engine.conftest import Bucket
from tests.fastvit_engine.storage.fault_server import FaultServer

SIZE = 200_000
CONTENT = random.Random(0).randbytes(SIZE)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF_S", 0.001)


@pytest.fixture(scope="module")
def s3(s3_bucket: Bucket) -> str:
    """A bucket with four shards; its URL."""
    for number in range(4):
        s3_bucket.pipe_file(f"bucket/data/part-{number}.tar", CONTENT[: SIZE - number])
    s3_bucket.pipe_file("bucket/data/README.md", b"not a shard")
    return "s3://bucket"


def s3_storage(s3: str, **options: Any) -> ShardStorage:
    return ShardStorage(
        [f"{s3}/data/part-{number}.tar" for number in range(4)], [SIZE - number for number in range(4)], **options
    )


def test_s3_by_range_and_through_the_cache(s3, tmp_path):
    for storage in (s3_storage(s3), s3_storage(s3, cache_dir=tmp_path, wait=30)):
        for shard, start in itertools.product(range(4), (0, 60_000)):
            assert storage.read(shard, start, 120_000) == CONTENT[start : start + 120_000]
    assert len(list(tmp_path.glob("*.shard"))) == 4
    assert storage.counters().cache_hits == 4


def test_s3_forked_after_use(s3):
    storage = s3_storage(s3)
    storage.read(0, 0, 10)
    child = os.fork()
    if child == 0:
        right = all(storage.read(shard, 5, 1000) == CONTENT[5:1005] for shard in range(4))
        os._exit(0 if right else 1)
    assert all(storage.read(shard, 5, 1000) == CONTENT[5:1005] for shard in range(4))
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def faulty(s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch):
    """A server before which the client behaves as before S3, and that fails by script; a bucket with one object."""
    with FaultServer({"/bucket/a.tar": CONTENT}).running() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url(""))
        yield server


@pytest.mark.parametrize(
    ("faults", "retries"),
    [
        ([], 0),
        ([("status", 503)], 1),
        ([("status", 503), ("status", 500), ("status", 429), ("status", 408)], 4),
        ([("drop", 20_000)], 1),
        ([("short", 20_000), ("short", 1), ("drop", 0)], 3),
        ([("stall", 20_000)], 1),
        ([("stall", 0)], 1),
    ],
    ids=str,
)
def test_a_read_under_faults(faulty, faults, retries):
    faulty.faults["/bucket/a.tar"] = list(faults)
    storage = ShardStorage(["s3://bucket/a.tar"], [SIZE], timeout=1)
    assert storage.read(0, 7, 120_000) == CONTENT[7:120_007]
    assert storage.read(0, SIZE - 5, 5) == CONTENT[-5:]
    assert not faulty.faults["/bucket/a.tar"]
    assert storage.counters().retries == retries


def test_a_connection_that_was_closed_while_idle_costs_at_most_one_attempt(faulty):
    """None if the client notices before it asks again."""
    faulty.faults["/bucket/a.tar"] = [("hang up",)]
    storage = ShardStorage(["s3://bucket/a.tar"], [SIZE], timeout=1)
    assert storage.read(0, 7, 120_000) == CONTENT[7:120_007]
    assert storage.read(0, SIZE - 5, 5) == CONTENT[-5:]
    assert storage.counters().retries <= 1


def test_a_broken_transfer_resumes_where_it_stopped(faulty):
    faulty.faults["/bucket/a.tar"] = [("short", 60_000)]
    storage = ShardStorage(["s3://bucket/a.tar"], [SIZE], timeout=1)
    assert storage.read(0, 1000, 100_000) == CONTENT[1000:101_000]
    assert [asked for _, asked in faulty.requests] == ["bytes=1000-100999", "bytes=61000-100999"]


def test_a_shard_that_changes_between_two_attempts_is_read_from_the_start_again(faulty, monkeypatch):
    other = bytes(SIZE)
    monkeypatch.setattr(remote, "_sleep", lambda *_: faulty.files.update({"/bucket/a.tar": other}))
    faulty.faults["/bucket/a.tar"] = [("short", 60_000)]
    assert ShardStorage(["s3://bucket/a.tar"], [SIZE]).read(0, 0, 100_000) == other[:100_000]


@pytest.mark.parametrize("fault", [("drop", 0), ("stall", 0), ("status", 503)], ids=str)
def test_a_store_that_stays_broken_ends_in_one_error(faulty, fault):
    faulty.always["/bucket/a.tar"] = fault
    storage = ShardStorage(["s3://bucket/a.tar"], [SIZE], timeout=0.3, retries=3)
    with pytest.raises(UserError, match=r"shard s3://bucket/a\.tar could not be read \(.*; attempt 4 was the last"):
        storage.read(0, 0, 10)
    assert storage.counters().retries == 3 and len(faulty.requests) == 4


@pytest.mark.parametrize("fault", [("status", 503), ("slow", 20)], ids=str)
def test_patience_bounds_a_read_whatever_the_attempts(faulty, fault):
    faulty.always["/bucket/a.tar"] = fault
    storage = ShardStorage(["s3://bucket/a.tar"], [SIZE], retries=10**6, patience=0.5)
    started = time.monotonic()
    with pytest.raises(UserError, match="could not be read"):
        storage.read(0, 0, 50_000)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("status", "message"),
    [(403, "access is denied: HTTP 403"), (401, "access is denied: HTTP 401"), (400, "HTTP 400"), (404, "not exist")],
)
def test_what_no_attempt_will_cure(faulty, status, message):
    faulty.always["/bucket/a.tar"] = ("status", status)
    with pytest.raises(UserError, match=rf"shard s3://bucket/a\.tar cannot be read \(.*{message}"):
        ShardStorage(["s3://bucket/a.tar"], [SIZE]).read(0, 0, 10)
    assert len(faulty.requests) == 1


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1000])
def test_another_size_than_the_index_says(faulty, size):
    with pytest.raises(UserError, match=f"a.tar has {SIZE} bytes instead of {size}"):
        ShardStorage(["s3://bucket/a.tar"], [size]).read(0, size - 10, 10)


def test_no_credentials_are_asked_for_public_objects(faulty, monkeypatch):
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert ShardStorage(["s3://bucket/a.tar"], [SIZE]).read(0, 0, 10) == CONTENT[:10]
    assert "authorization" not in {name.lower() for name in faulty.headers[0]}


def test_credentials_of_a_profile(faulty, monkeypatch, tmp_path: Path):
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = MYKEY\naws_secret_access_key = hush\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert ShardStorage(["s3://bucket/a.tar"], [SIZE]).read(0, 0, 10) == CONTENT[:10]
    assert "Credential=MYKEY/" in faulty.headers[0]["authorization"]


def test_the_region_of_a_bucket_is_asked_of_aws_unless_it_is_set(monkeypatch):
    with FaultServer({}).running() as server:
        server.always["/far"] = ("status", 403, {"x-amz-bucket-region": "eu-north-1"})
        monkeypatch.setattr(store_calls, "_AWS", server.url(""))
        keys = {"AWS_ACCESS_KEY_ID": "a"}
        assert store_calls._s3_options("far", keys, "") == {"region": "eu-north-1"}
        assert store_calls._s3_options("far", keys | {"AWS_REGION": "us-east-2"}, "") == {}
        assert store_calls._s3_options("far", keys, "http://minio") == {"endpoint": "http://minio"}


def test_google_storage_of_an_emulator(monkeypatch):
    with FaultServer({"/bucket/a%2Etar": CONTENT}).running() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url("").removeprefix("http://"))
        assert ShardStorage(["gs://bucket/a.tar"], [SIZE]).read(0, 7, 1000) == CONTENT[7:1007]


@pytest.mark.parametrize("path", ["bucket/data/part-9.tar", "no-such-bucket/part-0.tar"])
def test_s3_missing(s3, path):
    with pytest.raises(UserError, match=rf"shard s3://{path} cannot be read \(it does not exist\)"):
        ShardStorage([f"s3://{path}"], [SIZE]).read(0, 0, 10)


def test_s3_listing(s3):
    shards = [f"s3://bucket/data/part-{number}.tar" for number in range(4)]
    assert list_shards(["s3://bucket/data"]) == shards
    assert list_shards(["s3://bucket/data/"]) == shards
    assert list_shards(["s3://bucket/data/part-[12].tar"]) == shards[1:3]
    assert list_shards(["s3://bucket/{data,data}/part-{0..1}*.tar"]) == shards[:2]
    for empty in ("s3://bucket/nothing/", "s3://bucket/data/x-*.tar", "s3://no-such-bucket/"):
        with pytest.raises(UserError, match="matches no shards"):
            list_shards([empty])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("http://host/folder/", "a web server does not list its files"),
        ("http://host/part-*.tar", "a web server does not list its files"),
        ("nope://x/", "nope:// is not a kind of storage that is known"),
    ],
)
def test_remote_patterns_that_cannot_be(pattern, message):
    with pytest.raises(UserError, match=message):
        find_shards(pattern, "train")


def test_a_store_that_cannot_be_listed(faulty):
    faulty.always["/bucket"] = ("status", 403)
    with pytest.raises(UserError, match=r"'s3://bucket/x/', which cannot be listed \(access is denied: HTTP 403"):
        find_shards("s3://bucket/x/", "train")


def test_a_list_file(s3, tmp_path: Path):
    for name in ("b.tar", "a.tar"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text(f"# mine\nhttps://host/s-{{0..1}}.tar\n\n{s3}/data/*.tar\n{tmp_path}/?.tar\n")
    expected = [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar", "https://host/s-0.tar", "https://host/s-1.tar"]
    expected += [f"{s3}/data/part-{number}.tar" for number in range(4)]
    assert find_shards(f"@{tmp_path}/list.txt", "train") == expected
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="which names no shards"):
        find_shards(f"@{tmp_path}/empty.txt", "train")
    (tmp_path / "list.txt").write_text(f"{s3}/data/x*.tar\n")
    with pytest.raises(UserError, match=r"x\*\.tar', which matches no shards"):
        find_shards(f"@{tmp_path}/list.txt", "train")
    with pytest.raises(UserError, match=r"none\.txt, which cannot be read"):
        find_shards(f"@{tmp_path}/none.txt", "train")
