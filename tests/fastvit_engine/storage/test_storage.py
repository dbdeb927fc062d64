import base64
import multiprocessing
import os
import pickle
import random
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastvit_engine.errors import UserError
from fastvit_engine.storage import ShardStorage, http, local, remote, together
from tests.fastvit_engine.storage.fault_server import FaultServer

SIZE = 300_000
CONTENT = random.Random(0).randbytes(SIZE)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF_S", 0.001)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/a.tar": CONTENT}).running() as server:
        yield server


@pytest.fixture
def storage(server: FaultServer) -> ShardStorage:
    return ShardStorage([server.url("/a.tar")], [SIZE], timeout=5)


def in_fork(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked child."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=lambda: theirs.send(work()))
    child.start()
    theirs.close()
    answer = ours.recv() if ours.poll(30) else pytest.fail("the child does not answer")
    child.join(10)
    return answer


# Local files


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.tar" for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(random.Random(number).randbytes(1000 + number))
    return paths


def local_storage(files: list[Path], **options: Any) -> ShardStorage:
    return ShardStorage([str(path) for path in files], [path.stat().st_size for path in files], **options)


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_local_reads(files, prefix):
    storage = ShardStorage([prefix + str(files[3])], [1003])
    content = files[3].read_bytes()
    assert storage.read(0, 0, 1003) == content
    assert storage.read(0, 990, 13) == content[990:]
    assert storage.read(0, 17, 0) == b""
    counters = storage.counters()
    assert (counters.reads, counters.bytes, counters.downloaded) == (3, 1016, 0)
    assert counters.seconds > 0


def test_local_files_stay_open_up_to_a_bound_while_threads_read(files, monkeypatch):
    monkeypatch.setattr(local, "MOST_OPEN", 4)
    storage = local_storage(files)

    def is_right(number: int) -> bool:
        shard = number % len(files)
        return storage.read(shard, 5, 900) == contents[shard][5:905]

    contents = [path.read_bytes() for path in files]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(is_right, range(2000)))
    opened = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert sum(name in map(str, files) for name in opened) == 4


def test_local_cache_dir_is_not_used(files, tmp_path):
    local_storage(files, cache_dir=tmp_path / "cache").read(0, 0, 10)
    assert not (tmp_path / "cache").exists()


def test_local_errors_name_the_shard(files):
    storage = local_storage(files)
    files[0].unlink()
    with pytest.raises(UserError, match=r"/0\.tar does not exist"):
        storage.read(0, 0, 10)
    files[1].write_bytes(b"x" * 1002)
    with pytest.raises(
        UserError,
        match=r"/1\.tar has 1002 bytes instead of 1001: run the same command again",
    ):
        storage.read(1, 0, 10)
    storage.read(2, 0, 10)
    os.truncate(files[2], 500)
    with pytest.raises(UserError, match=r"/2\.tar was cut short"):
        storage.read(2, 450, 100)
    with pytest.raises(UserError, match=r"/3\.tar has 1003 bytes, but bytes 1000 to 1010"):
        storage.read(3, 1000, 10)
    files[4].unlink()
    files[4].mkdir()
    with pytest.raises(UserError, match=r"/4\.tar"):
        storage.read(4, 0, 10)


def test_a_file_that_a_network_file_system_lost_track_of_is_opened_again(files, monkeypatch):
    storage = local_storage(files)
    storage.read(0, 0, 10)
    read = local.read_exactly
    lost = iter([True])

    def read_once_lost(fd: int, offset: int, length: int) -> bytes:
        if next(lost, False):
            raise OSError(116, "Stale file handle")
        return read(fd, offset, length)

    monkeypatch.setattr(local, "read_exactly", read_once_lost)
    assert storage.read(0, 1, 10) == files[0].read_bytes()[1:11]


# HTTP


@pytest.mark.parametrize(
    ("faults", "retries"),
    [
        ([], 0),
        ([("drop", 0)], 1),
        ([("drop", 40_000)], 1),
        ([("short", 40_000), ("short", 1), ("drop", 0)], 3),
        ([("status", 503), ("status", 500), ("status", 429), ("status", 408)], 4),
        ([("stall", 40_000)], 1),
        ([("stall", 0)], 1),
        ([("no range",)], 0),
        ([("short", 40_000), ("no range",)], 1),
        ([("no range",), ("no range",)], 0),
        ([("chunked",)], 0),
        ([("hang up",)], 0),
        ([("status", 302, {"Location": "/moved/a.tar"})], 0),
    ],
    ids=str,
)
def test_every_read_gives_the_right_bytes(server, faults, retries):
    server.files["/moved/a.tar"] = CONTENT
    server.faults["/a.tar"] = list(faults)
    storage = ShardStorage([server.url("/a.tar")], [SIZE], timeout=0.3)
    assert storage.read(0, 100_000, 100_000) == CONTENT[100_000:200_000]
    assert storage.read(0, SIZE - 5, 5) == CONTENT[-5:]
    assert storage.counters().retries == retries
    assert not server.faults["/a.tar"]


def test_random_faults_under_many_threads(server):
    kinds = [None, None, ("drop", 500), ("short", 300), ("status", 503), ("no range",), ("chunked",), ("hang up",)]
    rng = random.Random(1)
    server.faults["/a.tar"] = [rng.choice(kinds) for _ in range(400)]
    storage = ShardStorage([server.url("/a.tar")], [SIZE], timeout=5)

    def is_right(number: int) -> bool:
        start = random.Random(number).randrange(SIZE - 1000)
        return storage.read(0, start, 1000) == CONTENT[start : start + 1000]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(is_right, range(200)))
    counters = storage.counters()
    assert counters.retries > 20
    assert (counters.reads, counters.bytes, counters.downloaded) == (200, 200_000, 200_000)


@pytest.mark.parametrize("seed", range(5))
def test_reads_of_a_batch_come_in_order_whatever_the_faults(server, seed, monkeypatch):
    """Merged or not, with more bytes than may be held or not."""
    rng = random.Random(seed)
    monkeypatch.setattr(together, "MOST_HELD", rng.choice([10, 20_000, 10**8]))
    monkeypatch.setattr(together, "GAP_BYTES", rng.choice([-1, 0, 3000]))
    server.files["/b.tar"] = CONTENT[::-1]
    server.faults["/a.tar"] = [rng.choice([None, ("short", 300), ("status", 503), ("no range",)]) for _ in range(40)]
    storage = ShardStorage([server.url("/a.tar"), server.url("/b.tar")], [SIZE, SIZE], timeout=5)
    starts = [rng.randrange(SIZE - 3000) for _ in range(60)]
    ranges = [(rng.randrange(2), start, rng.choice([0, 1, 3000])) for start in starts]
    expected = [(CONTENT, CONTENT[::-1])[shard][start : start + length] for shard, start, length in ranges]
    assert list(storage.read_many(ranges)) == expected
    counters = storage.counters()
    assert (counters.reads, counters.bytes) == (60, sum(map(len, expected)))


def test_neighbours_are_read_with_one_request(server, storage):
    ranges = [(0, start, 1000) for start in (9000, 1000, 2000, 200_000, 5000)]
    assert list(storage.read_many(ranges)) == [CONTENT[start : start + 1000] for _, start, _ in ranges]
    assert sorted(asked for _, asked in server.requests) == ["bytes=1000-9999", "bytes=200000-200999"]


def test_reads_of_a_batch_wait_for_the_server_together(server, storage):
    server.files = {f"/{number}.tar": CONTENT for number in range(16)}
    server.always = dict.fromkeys(server.files, ("slow", 0.5))
    storage = ShardStorage([server.url(path) for path in server.files], [SIZE] * 16)
    started = time.monotonic()
    assert all(data == CONTENT[:5000] for data in storage.read_many([(shard, 0, 5000) for shard in range(16)]))
    assert time.monotonic() - started < 4  # one after the other: 8


def test_a_batch_fails_where_its_shard_is_gone(server, storage):
    storage = ShardStorage([server.url("/a.tar"), server.url("/gone.tar")], [SIZE, SIZE])
    contents = storage.read_many([(0, 0, 10), (1, 0, 10), (0, 100_000, 10)])
    assert next(contents) == CONTENT[:10]
    with pytest.raises(UserError, match=r"gone\.tar cannot be read \(HTTP 404"):
        next(contents)


def test_a_broken_transfer_goes_on_where_it_stopped(server, storage):
    server.faults["/a.tar"] = [("short", 60_000)]
    assert storage.read(0, 1000, 100_000) == CONTENT[1000:101_000]
    assert [asked for _, asked in server.requests] == ["bytes=1000-100999", "bytes=61000-100999"]


def test_a_shard_that_changes_between_two_attempts_is_read_from_the_start_again(server, storage, monkeypatch):
    other = bytes(SIZE)
    monkeypatch.setattr(remote, "_sleep", lambda *_: server.files.update({"/a.tar": other}))
    server.faults["/a.tar"] = [("short", 60_000)]
    assert storage.read(0, 0, 100_000) == other[:100_000]


def test_the_server_may_ask_to_wait(server, storage):
    server.faults["/a.tar"] = [("status", 503, {"Retry-After": "1"})]
    started = time.monotonic()
    storage.read(0, 0, 10)
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize("status", [404, 403, 401, 410, 400])
def test_a_shard_that_is_gone_fails_at_once(server, status):
    server.always["/a.tar"] = ("status", status)
    url = server.url("/a.tar?signature=secret").replace("//", "//user:secret@")
    with pytest.raises(UserError, match=rf"shard {server.url('/a.tar')} cannot be read \(HTTP {status}") as error:
        ShardStorage([url], [SIZE]).read(0, 0, 10)
    assert "secret" not in str(error.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", [("drop", 0), ("short", 0), ("stall", 0), ("status", 503)], ids=str)
def test_a_server_that_stays_broken_ends_in_one_error(server, fault):
    server.always["/a.tar"] = fault
    storage = ShardStorage([server.url("/a.tar")], [SIZE], timeout=0.2, retries=3)
    started = time.monotonic()
    with pytest.raises(
        UserError, match=rf"shard {server.url('/a.tar')} could not be read \(.*; attempt 4 was the last"
    ):
        storage.read(0, 0, 10)
    assert time.monotonic() - started < 3
    assert len(server.requests) == 4
    assert storage.counters().retries == 3


def test_no_server_at_all():
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/a\.tar could not be read.*refused"):
        ShardStorage(["http://127.0.0.1:9/a.tar"], [SIZE], retries=2).read(0, 0, 10)


@pytest.mark.parametrize("fault", [("status", 503), ("slow", 20)], ids=str)
def test_patience_bounds_a_read_whatever_the_attempts(server, fault):
    server.always["/a.tar"] = fault
    storage = ShardStorage([server.url("/a.tar")], [SIZE], retries=10**6, patience=0.5)
    started = time.monotonic()
    with pytest.raises(UserError, match="could not be read"):
        storage.read(0, 0, 50_000)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("fault", [None, ("no range",)], ids=str)
@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1000])
def test_another_size_than_the_index_says(server, fault, size):
    server.always = {"/a.tar": fault} if fault else {}
    with pytest.raises(
        UserError,
        match=f"/a.tar has {SIZE} bytes instead of {size}: run the same command again",
    ):
        ShardStorage([server.url("/a.tar")], [size]).read(0, size - 10, 10)


def test_connections_are_kept_and_a_closed_one_is_no_failure(server, storage):
    for start in range(20):
        storage.read(0, start, 1000)
    assert server.connections == 1
    server.faults["/a.tar"] = [("hang up",)]
    storage.read(0, 0, 1000)
    time.sleep(0.05)
    assert storage.read(0, 7, 1000) == CONTENT[7:1007]
    assert server.connections == 2
    assert storage.counters().retries == 0


def test_redirects_end(server, storage):
    server.always["/a.tar"] = ("status", 302, {"Location": "/a.tar"})
    with pytest.raises(UserError, match="more than 5 redirects"):
        storage.read(0, 0, 10)


def test_a_redirect_leads_to_web_servers_only(server, storage):
    server.faults["/a.tar"] = [("status", 302, {"Location": "file:///etc/hostname"})]
    with pytest.raises(UserError, match="file:// names no web server"):
        storage.read(0, 0, 10)


def test_a_server_that_ignores_ranges_is_named_once(server, storage, caplog):
    server.always["/a.tar"] = ("no range",)
    for start in (10, 20):
        storage.read(0, start, 10)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        f"the server of {server.url('/a.tar')} ignores Range"
    ]


def test_password_and_proxy(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url("/"))
    storage = ShardStorage(["http://me:p%40ss@far.invalid/a.tar"], [SIZE])
    assert storage.read(0, 3, 10) == CONTENT[3:13]
    assert server.headers[0]["Host"] == "far.invalid"
    assert base64.b64decode(server.headers[0]["Authorization"].removeprefix("Basic ")) == b"me:p@ss"


@pytest.fixture
def tls_server(tmp_path, monkeypatch) -> Iterator[FaultServer]:
    """A server with a certificate of its own, which is not trusted yet."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subprocess.run(["openssl", "req", "-x509", *curve, "-nodes", *names, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    http._tls.cache_clear()
    with FaultServer({"/a.tar": CONTENT}, tls=context).running() as server:
        yield server
    http._tls.cache_clear()


def test_https(tls_server, tmp_path, monkeypatch):
    storage = ShardStorage([tls_server.url("/a.tar")], [SIZE], timeout=5)
    with pytest.raises(UserError, match="certificate is not trusted"):
        storage.read(0, 0, 10)
    assert storage.counters().retries == 0
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    http._tls.cache_clear()
    storage = ShardStorage([tls_server.url("/a.tar")], [SIZE], timeout=5)
    tls_server.faults["/a.tar"] = [("short", 40_000), ("drop", 40_000), ("hang up",)]
    assert storage.read(0, 1, 200_000) == CONTENT[1:200_001]
    assert storage.counters().retries == 2
    time.sleep(0.05)
    assert storage.read(0, 1, 100) == CONTENT[1:101]
    assert storage.counters().retries == 2
    assert tls_server.connections == 5
    assert in_fork(lambda: storage.read(0, 7, 100)) == CONTENT[7:107]
    assert storage.read(0, 9, 100) == CONTENT[9:109]


def test_https_through_a_proxy(server, tls_server, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    monkeypatch.setenv("https_proxy", server.url("/").replace("//", "//me:pass@", 1))
    storage = ShardStorage([tls_server.url("/a.tar")], [SIZE], timeout=5)
    for start in range(3):
        assert storage.read(0, start, 100_000) == CONTENT[start : start + 100_000]
    assert [path for path, _ in server.requests] == [f"127.0.0.1:{tls_server.port}"]
    assert base64.b64decode(server.headers[0]["Proxy-Authorization"].removeprefix("Basic ")) == b"me:pass"


@pytest.mark.parametrize("path", ["/with space é.tar", "/with%20percent.tar"])
def test_paths_are_quoted_as_needed(server, path):
    server.files = {"/with%20space%20%C3%A9.tar": CONTENT, "/with%20percent.tar": CONTENT}
    assert ShardStorage([server.url(path)], [SIZE]).read(0, 0, 10) == CONTENT[:10]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:cat a.tar", "is a command, which cannot be read by position"),
        ("nope://a.tar", "nope://a.tar cannot be opened: nope:// is not a kind of storage that is known"),
        ("http:///a.tar", "names no web server"),
        ("http://host:port/a.tar", "cannot be read"),
    ],
)
def test_bad_urls(url, message):
    with pytest.raises(UserError, match=message):
        ShardStorage([url], [SIZE]).read(0, 0, 10)


def test_pickled(server, storage, tmp_path):
    storage.read(0, 0, 10)
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.read(0, 5, 10) == CONTENT[5:15]
    assert (copy.counters().reads, storage.counters().reads) == (1, 1)


def test_forked_after_use_while_threads_read(server, storage):
    """Parent and child must not share a connection, nor the child wait for a lock that a thread of the parent held."""
    stop = threading.Event()

    def read_on() -> bool:
        right = True
        while not stop.is_set():
            right &= storage.read(0, 1000, 50_000) == CONTENT[1000:51_000]
        return right

    def child() -> tuple[bool, int]:
        right = all(storage.read(0, start, 5000) == CONTENT[start : start + 5000] for start in range(0, 100_000, 5000))
        return right, storage.counters().reads

    storage.read(0, 0, 10)
    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read_on) for _ in range(2)]
        try:
            for _ in range(5):
                assert in_fork(child) == (True, 20)
        finally:
            stop.set()
        assert all(reader.result() for reader in readers)
    assert storage.counters().retries == 0
