"""Remote shards that are read once, from beginning to end."""

import random
from collections.abc import Iterator

import pytest

from fastvit_engine.errors import UserError
from fastvit_engine.storage import remote
from fastvit_engine.storage.errors import GaveUp
from fastvit_engine.storage.remote import TryPolicy, stream_bytes
from tests.fastvit_engine.storage.fault_server import FaultServer

CONTENT = random.Random(0).randbytes(3_000_000)
POLICY = TryPolicy(retries=2, timeout=0.5, patience=0.0)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF_S", 0.001)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/a.tar": CONTENT}).running() as server:
        yield server


def read(server: FaultServer, path: str = "/a.tar") -> bytes:
    return b"".join(stream_bytes(server.url(path), POLICY))


@pytest.mark.parametrize("behaviour", [None, ("no range",), ("chunked",), ("hang up",)])
def test_one_plain_request_whatever_the_server_knows(server, behaviour):
    server.always["/a.tar"] = behaviour
    assert read(server) == CONTENT
    assert server.requests == [("/a.tar", None)]
    assert sum(server.sent.values()) <= len(CONTENT) + 100


@pytest.mark.parametrize("fault", [("drop", 700_000), ("short", 700_000), ("stall", 700_000)])
@pytest.mark.parametrize("then", [None, ("no range",), ("chunked",)])
def test_a_broken_transfer_resumes(server, fault, then):
    server.faults["/a.tar"] = [fault, ("status", 503), then]
    assert read(server) == CONTENT
    assert [asked for _, asked in server.requests][0] is None
    if fault[0] != "drop":  # a reset may take bytes with it that had been sent
        assert server.requests[1:] == [("/a.tar", "bytes=700000-")] * 2


def test_attempts_in_a_row_that_bring_nothing_are_limited(server):
    server.faults["/a.tar"] = [("short", 10), *[("short", 10)] * 20]
    assert read(server) == CONTENT  # each of them brought something
    server.faults["/a.tar"] = [("short", 10)]
    server.always["/a.tar"] = ("status", 503)
    with pytest.raises(GaveUp, match=r"could not be read \(HTTP 503.*; attempt 3 was the last\)"):
        read(server)


def test_a_shard_that_changes_meanwhile_is_refused(server):
    server.faults["/a.tar"] = [("short", 1_000_000)]
    chunks = stream_bytes(server.url("/a.tar"), POLICY)
    next(chunks)
    server.files["/a.tar"] = CONTENT[::-1]
    with pytest.raises(UserError, match="changed while it was being read"):
        list(chunks)


def test_what_no_attempt_will_cure(server):
    with pytest.raises(UserError, match=r"shard http://.*/gone\.tar cannot be read \(HTTP 404"):
        read(server, "/gone.tar")
    assert len(server.requests) == 1


def test_object_store(s3_bucket):
    s3_bucket.pipe_file("bucket/stream/a.tar", CONTENT)
    assert b"".join(stream_bytes("s3://bucket/stream/a.tar", TryPolicy(retries=2, timeout=10, patience=0.0))) == CONTENT
