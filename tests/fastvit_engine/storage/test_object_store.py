import asyncio
import errno
import itertools
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.registry import known_implementations

from fastvit_engine.data.shards.names import find_shards, list_shards
from fastvit_engine.errors import UserError
from fastvit_engine.storage import ShardStorage, object_store, remote
from tests.fastvit_engine.storage.fault_server import FaultServer

SIZE = 200_000
CONTENT = random.Random(0).randbytes(SIZE)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF_S", 0.001)
    monkeypatch.setattr(object_store, "CHUNK_BYTES", 50_000)


# A file system of fsspec that is not asynchronous


@pytest.fixture
def memory() -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    for number in range(3):
        fs.pipe_file(f"/folder/{number}.tar", CONTENT[: SIZE - number])
    fs.pipe_file("/folder/README.md", b"")
    fs.pipe_file("/folder/deeper/3.tar", b"")
    yield "memory://folder"
    fs.rm("/folder", recursive=True)


def test_any_file_system_that_fsspec_knows(memory, tmp_path):
    urls, sizes = [f"{memory}/{number}.tar" for number in range(3)], [SIZE, SIZE - 1, SIZE - 2]
    for storage in (ShardStorage(urls, sizes), ShardStorage(urls, sizes, cache_dir=tmp_path)):
        for shard in range(3):
            assert storage.read(shard, 100, 150_000) == CONTENT[100:150_100]
    assert {path.read_bytes() for path in tmp_path.glob("*.shard")} == {CONTENT[:size] for size in sizes}


def test_errors_name_the_shard(memory):
    with pytest.raises(UserError, match=r"shard memory://folder/9\.tar cannot be read \(it does not exist\)"):
        ShardStorage([f"{memory}/9.tar"], [SIZE]).read(0, 0, 10)
    with pytest.raises(UserError, match=r"/1\.tar has 199999 bytes instead of the 200000 in the index"):
        ShardStorage([f"{memory}/1.tar"], [SIZE]).read(0, 0, 10)


def test_a_missing_package_is_named(monkeypatch):
    known = {"class": "no_such_package.FileSystem", "err": "Install no_such_package to access a farstore"}
    monkeypatch.setitem(known_implementations, "far", known)
    with pytest.raises(UserError, match="far://a.tar cannot be opened: Install no_such_package"):
        ShardStorage(["far://a.tar"], [SIZE]).read(0, 0, 10)
    with pytest.raises(UserError, match="far://a/ cannot be opened: Install no_such_package"):
        find_shards("far://a/", "train")


# An asynchronous one that misbehaves by script


class FaultyFileSystem(AsyncFileSystem):
    protocol = "faulty"
    cachable = False
    script: list[Any] = []
    calls = 0

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": SIZE, "type": "file"}

    async def _cat_file(self, path: str, start: int = 0, end: int = 0, **_: Any) -> bytes:
        FaultyFileSystem.calls += 1
        fault = self.script.pop(0) if self.script else None
        if isinstance(fault, Exception):
            raise fault
        if fault == "stall":
            await asyncio.sleep(60)
        return CONTENT[start:end][: fault if isinstance(fault, int) else None]


class NoCredentialsError(Exception):
    pass


class StatusError(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


@pytest.fixture
def faulty() -> Iterator[ShardStorage]:
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.script, FaultyFileSystem.calls = [], 0
    yield ShardStorage(["faulty://a.tar"], [SIZE], timeout=0.5, retries=3)
    FaultyFileSystem.script = []


def test_passing_failures_of_a_store(faulty):
    FaultyFileSystem.script = [
        OSError(errno.EBUSY, "SlowDown"),
        StatusError(503),
        StatusError(429),
        None,
        10_000,  # a short piece
        ConnectionResetError(),
        "stall",
        None,
        RuntimeError("?"),
    ]
    started = time.monotonic()
    assert faulty.read(0, 7, SIZE - 7) == CONTENT[7:]
    assert faulty.counters().retries == 7
    assert time.monotonic() - started < 5
    assert not FaultyFileSystem.script


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(),
        PermissionError("denied"),
        OSError(errno.EINVAL, "InvalidBucketName"),
        NoCredentialsError("Unable to locate credentials"),
        StatusError(401),
    ],
    ids=repr,
)
def test_lasting_failures_of_a_store_are_not_tried_again(faulty, error):
    FaultyFileSystem.script = [error]
    with pytest.raises(UserError, match=r"shard faulty://a\.tar cannot be read"):
        faulty.read(0, 0, 10)
    assert FaultyFileSystem.calls == 1


def test_a_store_that_stays_broken_ends_in_one_error(faulty):
    FaultyFileSystem.script = [OSError(errno.EBUSY, "SlowDown")] * 100
    with pytest.raises(
        UserError, match=r"shard faulty://a\.tar could not be read \(.*SlowDown; attempt 4 was the last"
    ):
        faulty.read(0, 0, 10)
    assert FaultyFileSystem.calls == 4


# A real client against an S3-compatible server


@pytest.fixture(scope="module")
def s3(s3_bucket: AbstractFileSystem) -> str:
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


@pytest.mark.parametrize(
    "fault",
    [("status", 503), ("drop", 20_000), ("stall", 20_000)],
    ids=str,
)
def test_s3_client_under_faults(s3, monkeypatch, fault):
    with FaultServer({"/bucket/a.tar": CONTENT}).running() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url(""))
        monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "_cache", {})
        server.faults["/bucket/a.tar"] = [None, fault, fault]
        storage = ShardStorage(["s3://bucket/a.tar"], [SIZE], timeout=1)
        assert storage.read(0, 7, 120_000) == CONTENT[7:120_007]
        assert not server.faults["/bucket/a.tar"]


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


# Listing, on the file system that needs no server


def test_remote_listing(memory):
    shards = [f"memory://folder/{number}.tar" for number in range(3)]
    for pattern in ("memory://folder", "memory://folder/", "memory://folder/*.tar", "memory://{folder,folder}/?.tar"):
        assert find_shards(pattern, "train") == shards
    assert list_shards(["memory://folder/1.tar", "memory://folder/{2..2}.tar"]) == shards[1:]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("memory://nothing/", "'memory://nothing/', which matches no shards"),
        ("memory://folder/x*.tar", "which matches no shards"),
        ("http://host/folder/", "a web server does not list its files"),
        ("http://host/part-*.tar", "a web server does not list its files"),
    ],
)
def test_remote_patterns_that_cannot_be(memory, pattern, message):
    with pytest.raises(UserError, match=message):
        find_shards(pattern, "train")


def test_a_store_that_cannot_be_listed(faulty):
    with pytest.raises(UserError, match=r"'faulty://x/', which cannot be listed \(NotImplementedError\)"):
        find_shards("faulty://x/", "train")


def test_a_list_file(memory, tmp_path: Path):
    for name in ("b.tar", "a.tar"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text(f"# mine\nhttps://host/s-{{0..1}}.tar\n\n{memory}/*.tar\n{tmp_path}/?.tar\n")
    expected = [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar", "https://host/s-0.tar", "https://host/s-1.tar"]
    expected += [f"memory://folder/{number}.tar" for number in range(3)]
    assert find_shards(f"@{tmp_path}/list.txt", "train") == expected
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="which names no shards"):
        find_shards(f"@{tmp_path}/empty.txt", "train")
    (tmp_path / "list.txt").write_text(f"{memory}/x*.tar\n")
    with pytest.raises(UserError, match=r"x\*\.tar', which matches no shards"):
        find_shards(f"@{tmp_path}/list.txt", "train")
    with pytest.raises(UserError, match=r"none\.txt, which cannot be read"):
        find_shards(f"@{tmp_path}/none.txt", "train")
