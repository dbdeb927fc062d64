"""Object stores, against servers that speak S3."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastvit_engine.errors import UserError
from fastvit_engine.storage import store_process
from fastvit_engine.storage.source import Exists, Missing, Refused
from fastvit_engine.storage.stores import open_store

pytest.importorskip("obstore", reason="needs obstore: pip install obstore")
_fork = multiprocessing.get_context("fork")


@pytest.fixture
def store(s3_bucket):
    return open_store("s3://bucket")[0]


def test_urls_lead_to_a_bucket_and_a_key():
    for url, root, key in [
        ("s3://bucket/a/b.tar", "s3://bucket", "a/b.tar"),
        ("s3a://bucket/a/", "s3://bucket", "a"),
        ("gcs://bucket", "gs://bucket", ""),
        ("az://container/a", "az://container", "a"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfss://container@account.dfs.core.windows.net/", "a"),
    ]:
        store, found = open_store(url)
        assert (store.config.root, found) == (root, key)
    with pytest.raises(UserError, match="far:// is not a kind of storage that is known"):
        open_store("far://a/b")


def test_secrets_are_not_in_what_is_shown(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    assert "hush" not in repr(open_store("s3://bucket/a")[0])


def test_objects_are_written_read_listed_and_removed(store):
    store.write("stores/a/x.tar", b"0123456789")
    store.write("stores/b.tar", b"b")
    assert store.read("stores/a/x.tar") == b"0123456789"
    assert store.read("stores/a/x.tar", 3, 6) == b"345"
    assert store.head("stores/a/x.tar").size == 10
    assert {(info.key, info.is_folder) for info in store.list_folder("stores")} == {
        ("stores/a", True),
        ("stores/b.tar", False),
    }
    assert {info.key: info.size for info in store.list_all("stores")} == {"stores/a/x.tar": 10, "stores/b.tar": 1}
    assert store.glob("stores/*.tar") == ["stores/b.tar"]
    assert store.glob("stores/**.tar") == ["stores/a/x.tar", "stores/b.tar"]
    assert store.glob("stores/[!a].t?r") == ["stores/b.tar"]
    store.delete("stores/b.tar", "stores/a/x.tar")
    assert not list(store.list_all("stores"))


def test_the_version_changes_with_the_object(store):
    store.write("stores/v", b"1")
    first = store.head("stores/v").version
    store.write("stores/v", b"2")
    assert store.open("stores/v").version == store.head("stores/v").version != first


def test_a_stream_of_chunks_becomes_one_object(store):
    chunks = [os.urandom(3 << 20) for _ in range(15)]  # in two parts
    store.write_stream("stores/stream", map(memoryview, chunks))
    assert store.read("stores/stream") == b"".join(chunks)


def test_a_stream_that_fails_leaves_no_object(store):
    def chunks() -> Iterator[bytes]:
        yield bytes(40 << 20)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.write_stream("stores/broken", chunks())
    assert not store.exists("stores/broken")


def test_what_a_store_refuses(store):
    store.write("stores/once", b"1")
    with pytest.raises(Exists):
        store.write("stores/once", b"2", create=True)
    assert store.read("stores/once") == b"1"
    with pytest.raises(Missing):
        store.read("stores/none")
    with pytest.raises(Missing):
        open_store("s3://no-such-bucket/a")[0].list_folder("")
    with pytest.raises(Refused, match="empty path segment"):
        store.read("a//b")
    behind = store.open("stores/once", 5, 7)
    assert (behind.size, list(behind.chunks)) == (1, [])


# ---- Processes. Each of the tests would wait forever if obstore ran in a process that it cannot run in.


def _in_a_fork(function: Callable[[], Any], daemon: bool) -> Any:
    receiver, sender = _fork.Pipe(duplex=False)
    process = _fork.Process(target=lambda: sender.send(function()), daemon=daemon)
    process.start()
    try:
        assert receiver.poll(30), "the forked process hangs"
        return receiver.recv()
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("daemon", [True, False], ids=["data worker", "other process"])
@pytest.mark.parametrize("after", ["nothing", "a read", "a read by obstore here"])
def test_a_forked_process_reads(store, daemon, after):
    """Whatever its parent has done before. Data workers read by themselves if their parent has not used obstore."""
    store.write("stores/fork", b"0123456789")

    def parent() -> tuple[bool, bytes]:
        if after == "a read":
            store.read("stores/fork")
        elif after == "a read by obstore here":
            list(store_process.CALLS["get"](store.config, "stores/fork", 0, None))
        return _in_a_fork(lambda: (store_process.may_call_here(), store.read("stores/fork", 2, 4)), daemon)

    receiver, sender = _fork.Pipe(duplex=False)
    process = _fork.Process(target=lambda: sender.send(parent()))
    clean = "obstore" not in sys.modules
    process.start()
    assert receiver.poll(60)
    by_itself, content = receiver.recv()
    process.join()
    assert content == b"23"
    assert by_itself == (daemon and clean and after != "a read by obstore here")


def test_a_helper_that_was_killed_is_started_again(store):
    store.write("stores/again", b"1")
    store_process._helper._control.close()
    store_process._helper._control = None
    store_process._helper._idle.clear()
    assert store.read("stores/again") == b"1"
