import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastvit_engine.errors import UserError
from fastvit_engine.storage import ShardStorage, cache, downloads, remote
from fastvit_engine.storage.cache import Busy, Download, NoRoom, Present, ShardCache, cache_name
from tests.fastvit_engine.storage.fault_server import FaultServer

SIZE = 100_000
FILES = {f"/{number}.tar": random.Random(number).randbytes(SIZE + number) for number in range(8)}
CONTENTS = list(FILES.values())
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF_S", 0.001)
    monkeypatch.setattr(downloads, "NO_ROOM_PAUSE_S", 0.05)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(dict(FILES)).running() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def open_storage(server: FaultServer, folder: Path) -> Iterator[Callable[..., ShardStorage]]:
    """open_storage(**options) -> a storage of the server's shards with the cache folder"""
    opened = []

    def open_one(**options: Any) -> ShardStorage:
        options = {"cache_dir": folder, "timeout": 5, "wait": 30} | options
        opened.append(ShardStorage([server.url(path) for path in FILES], [len(c) for c in CONTENTS], **options))
        return opened[-1]

    yield open_one
    server.release.set()
    for storage in opened:
        storage.close()


def is_right(storage: ShardStorage, shard: int, offset: int = 1000, length: int = 2000) -> bool:
    return storage.read(shard, offset, length) == CONTENTS[shard][offset : offset + length]


def cached(folder: Path) -> list[int]:
    """Numbers of the shards that lie whole in the cache."""
    return sorted(int(path.name.partition(".")[0]) for path in folder.glob("*.shard"))


def parts(folder: Path) -> list[Path]:
    return list(folder.glob("*.part"))


def whole(server: FaultServer) -> list[int]:
    """Numbers of the shards that were asked for whole, in order."""
    return [int(path[1]) for path, asked in server.requests if asked == f"bytes=0-{len(CONTENTS[int(path[1])]) - 1}"]


def until(condition: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


def set_last_use(folder: Path, ages: dict[int, float]) -> None:
    for shard, age in ages.items():
        (path,) = folder.glob(f"{shard}.tar.*.shard")
        os.utime(path, (time.time() - age,) * 2)


# One shard


def test_a_shard_is_downloaded_once_and_then_read_from_the_folder(server, open_storage, folder):
    storage = open_storage()
    for start in range(10):
        assert is_right(storage, 3, start)
    assert whole(server) == [3]
    assert len(server.requests) == 1
    assert (cached(folder), parts(folder)) == ([3], [])
    counters = storage.counters()
    assert (counters.cache_hits, counters.cache_misses, counters.downloaded) == (9, 1, SIZE + 3)


def test_another_run_finds_the_shards_of_the_last(server, open_storage):
    open_storage().read(3, 0, 10)
    storage = open_storage()
    assert is_right(storage, 3)
    assert len(server.requests) == 1
    assert storage.counters().cache_hits == 1


def test_a_broken_download_goes_on_where_it_stopped(server, open_storage):
    server.faults["/3.tar"] = [("short", 60_000), ("status", 503)]
    storage = open_storage()
    assert is_right(storage, 3, 59_000)
    assert [asked for _, asked in server.requests] == ["bytes=0-100002", "bytes=60000-100002", "bytes=60000-100002"]
    assert storage.counters().retries == 2


def test_a_shard_of_another_size_or_gone_is_one_error(server, open_storage, folder):
    server.files["/3.tar"] = CONTENTS[3][:-1]
    server.always["/4.tar"] = ("status", 404)
    storage = open_storage()
    with pytest.raises(
        UserError,
        match=r"/3\.tar has 100002 bytes instead of 100003: run the same command again",
    ):
        storage.read(3, 0, 10)
    with pytest.raises(UserError, match=r"/4\.tar cannot be read \(HTTP 404"):
        storage.read(4, 0, 10)
    assert (cached(folder), parts(folder)) == ([], [])
    assert is_right(storage, 5)


def test_a_server_that_stays_broken_is_one_error_in_bounded_time(server, open_storage):
    server.always["/3.tar"] = ("short", 0)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"/3\.tar could not be read \(.*; attempt 3 was the last"):
        open_storage(retries=2).read(3, 0, 10)
    assert time.monotonic() - started < 5


def test_a_shard_larger_than_the_limit_is_read_by_range(server, open_storage, folder):
    storage = open_storage(cache_bytes=SIZE - 1)
    storage.will_need([3])
    assert is_right(storage, 3)
    assert cached(folder) == []
    assert len(server.requests) == 1


def test_a_shard_that_was_cut_short_in_the_folder_is_downloaded_again(server, open_storage, folder):
    open_storage().read(3, 0, 10)
    (path,) = folder.glob("*.shard")
    path.write_bytes(bytes(500))
    storage = open_storage()
    assert is_right(storage, 3, 0, 100)
    assert whole(server) == [3, 3]
    assert path.read_bytes() == CONTENTS[3]


def test_what_a_killed_run_left_is_cleaned_and_other_files_are_not(open_storage, folder):
    folder.mkdir()
    name = cache_name("http://x/y.tar", 5)
    (folder / f"{name}.{'0' * 32}.part").write_bytes(b"garbage")
    (folder / "notes.part").write_bytes(b"mine")
    (folder / "mine.shard").write_bytes(b"mine")
    open_storage(cache_bytes=SIZE * 2).read(3, 0, 10)
    assert parts(folder) == [folder / "notes.part"]
    assert (folder / "mine.shard").exists()


def test_a_folder_that_cannot_be_used(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cache folder .*file/cache cannot be used .*choose a folder on a local disk"):
        ShardStorage([server.url("/3.tar")], [SIZE + 3], cache_dir=tmp_path / "file" / "cache")


def test_names_tell_urls_and_sizes_apart():
    names = {cache_name("http://a/x.tar", 1), cache_name("http://b/x.tar", 1), cache_name("http://a/x.tar", 2)}
    assert len(names) == 3
    assert all(cache.OURS.fullmatch(f"{name}.shard")["name"] == name for name in names)
    assert len(cache_name("s3://bucket/" + "x" * 500 + "/é y" * 100 + ".tar?a=1/2", 1)) < 200


# Room


def test_the_least_recently_used_shard_is_evicted(server, open_storage, folder, monkeypatch):
    monkeypatch.setattr(cache, "IDLE_S", 0.0)
    storage = open_storage(cache_bytes=3 * SIZE + 100)
    for shard in (0, 1, 2):
        storage.read(shard, 0, 10)
    set_last_use(folder, {0: 50, 1: 70, 2: 60})
    assert is_right(storage, 1)  # now the most recent
    assert is_right(storage, 3)
    assert cached(folder) == [0, 1, 3]
    assert is_right(storage, 2)
    assert cached(folder) == [1, 2, 3]


def test_shards_in_use_are_not_evicted(server, open_storage, folder):
    storage = open_storage(cache_bytes=3 * SIZE + 100)
    for shard in range(6):
        assert is_right(storage, shard)
    assert cached(folder) == [0, 1, 2]
    set_last_use(folder, {0: 1000, 1: 1000})
    time.sleep(0.06)
    assert is_right(storage, 5)
    assert len(cached(folder)) == 3
    assert {2, 5} <= set(cached(folder))


def test_an_evicted_shard_stays_readable_to_whoever_reads_it(open_storage, folder, monkeypatch):
    storage = open_storage()
    storage.read(3, 0, 10)
    read = cache.read_exactly

    def evict_and_read(fd: int, offset: int, length: int) -> bytes:
        for path in folder.glob("*.shard"):
            path.unlink()
        return read(fd, offset, length)

    monkeypatch.setattr(cache, "read_exactly", evict_and_read)
    assert is_right(storage, 3)
    assert storage.counters().cache_hits == 1
    assert not [fd for fd in os.listdir("/proc/self/fd") if ".shard" in _target(fd)]  # its room is free again


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


def test_the_room_of_a_download_is_taken_when_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "IDLE_S", 0.0)
    shards = ShardCache(tmp_path, 250)
    first = shards.begin("a.tar." + "0" * 16, 100, ())
    second = shards.begin("b.tar." + "1" * 16, 100, ())
    assert isinstance(first, Download) and isinstance(second, Download)
    assert isinstance(shards.begin("c.tar." + "2" * 16, 100, ()), NoRoom)
    assert isinstance(shards.begin("a.tar." + "0" * 16, 100, ()), Busy)
    first.write(0, bytes(100))
    first.publish()
    assert isinstance(shards.begin("a.tar." + "0" * 16, 100, ()), Present)
    assert isinstance(shards.begin("c.tar." + "2" * 16, 100, ["a.tar." + "0" * 16]), NoRoom)
    third = shards.begin("c.tar." + "2" * 16, 100, ())  # evicts a
    assert isinstance(third, Download)
    second.discard()
    third.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def _read_at_random(storage: ShardStorage, seed: int, reads: int) -> bool:
    rng = random.Random(seed)
    return all(is_right(storage, rng.randrange(8), rng.randrange(SIZE - 2000)) for _ in range(reads))


def test_eviction_under_pressure_with_concurrent_readers(server, open_storage, folder, monkeypatch):
    monkeypatch.setattr(cache, "IDLE_S", 0.0)
    limit = int(3.5 * SIZE)
    storage = open_storage(cache_bytes=limit)
    used, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            with ShardCache(folder, limit)._locked():
                used.append(sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".shard", ".part")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    children = [FORK.Process(target=lambda n=n: sys.exit(not _read_at_random(storage, n, 60))) for n in range(2)]
    for child in children:
        child.start()
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(lambda seed: _read_at_random(storage, seed, 60), range(10, 13)))
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    stop.set()
    watcher.join()
    assert SIZE < max(used) <= limit
    assert parts(folder) == []
    counters = storage.counters()
    assert counters.cache_hits + counters.cache_misses == 180
    assert counters.cache_hits > 0


@pytest.mark.parametrize("after", [0, 40_000])
def test_a_full_disk_costs_speed_only(server, open_storage, folder, monkeypatch, caplog, after):
    pwrite, full = os.pwrite, [True]

    def full_pwrite(fd: int, data: Any, position: int) -> int:
        if full[0] and position + len(data) > after:
            if position >= after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[: after - position]
        return pwrite(fd, data, position)

    monkeypatch.setattr(os, "pwrite", full_pwrite)
    storage = open_storage()
    for shard in range(4):
        assert is_right(storage, shard)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left on device" in caplog.text
    assert (cached(folder), parts(folder)) == ([], [])
    assert len(whole(server)) <= 1

    full[0] = False
    storage._downloads._broken_until = 0.0  # a minute later
    assert is_right(storage, 5)
    assert cached(folder) == [5]


def test_a_folder_that_vanishes_costs_speed_only(open_storage, folder, caplog):
    storage = open_storage()
    assert is_right(storage, 0)
    shutil.rmtree(folder)
    for shard in range(4):
        assert is_right(storage, shard)
    assert len(caplog.records) <= 1


def test_a_file_size_limit_costs_speed_only(open_storage, folder):
    storage = open_storage()

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2))
        sys.exit(not (is_right(storage, 0) and is_right(storage, 1)))

    process = FORK.Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert (cached(folder), parts(folder)) == ([], [])


# Several processes


def test_several_processes_download_each_shard_once(server, open_storage, folder):
    storage = open_storage()
    for path in FILES:
        server.always[path] = ("slow", 0.2)

    def child(number: int) -> None:
        order = random.Random(number).sample(range(8), 8)
        sys.exit(not all(is_right(storage, shard) for shard in order))

    children = [FORK.Process(target=child, args=(number,)) for number in range(4)]
    for process in children:
        process.start()
    for process in children:
        process.join(30)
        assert process.exitcode == 0
    assert sorted(path for path, _ in server.requests) == sorted(FILES)
    assert cached(folder) == list(range(8))


@pytest.mark.parametrize("with_child", [False, True], ids=["", "that has a child"])
def test_a_killed_downloader_is_replaced(server, open_storage, folder, with_child):
    """The lock of a killed process must go with it, also where its forked children live on."""
    storage = open_storage()
    server.faults["/3.tar"] = [("stall", 40_000)]
    ours, theirs = FORK.Pipe()

    def downloader() -> None:
        reading = threading.Thread(target=storage.read, args=(3, 0, 10), daemon=True)
        reading.start()
        until(lambda: server_sent() >= 40_000)
        if with_child and os.fork() == 0:
            theirs.send(os.getpid())
            time.sleep(60)
        if not with_child:
            theirs.send(0)
        time.sleep(60)

    def server_sent() -> int:
        return storage.counters().downloaded

    process = FORK.Process(target=downloader)
    process.start()
    assert ours.poll(10)
    grandchild = ours.recv()
    assert len(parts(folder)) == 1
    waiting = ThreadPoolExecutor(1).submit(is_right, storage, 3)
    time.sleep(0.1)
    assert not waiting.done()
    os.kill(process.pid, signal.SIGKILL)
    try:
        assert waiting.result(5)
        assert cached(folder) == [3]
        assert parts(folder) == []
        assert whole(server) == [3, 3]
        assert len(server.requests) == 2
    finally:
        process.join()
        if grandchild:
            os.kill(grandchild, signal.SIGKILL)


def test_a_downloader_that_hangs_is_waited_for_once_and_then_read_past(server, open_storage, folder):
    server.faults["/3.tar"] = [("stall", 40_000)]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(is_right, open_storage(), 3)
        until(lambda: parts(folder))
        second = open_storage(wait=0.3)
        started = time.monotonic()
        assert is_right(second, 3)
        assert 0.3 <= time.monotonic() - started < 2
        for offset in range(100):
            assert is_right(second, 3, offset)
        assert time.monotonic() - started < 3
        assert not first.done()
        server.release.set()
        assert first.result()
    assert cached(folder) == [3]
    until(lambda: is_right(second, 3) and second.counters().cache_hits > 0)


def test_a_process_that_stops_inside_the_lock_is_read_past(open_storage, folder, monkeypatch, caplog):
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.2)
    storage = open_storage()
    with ShardCache(folder, None)._locked():
        assert is_right(storage, 3)
    assert "another process holds its lock" in caplog.text


def test_forked_while_downloading(server, open_storage):
    storage = open_storage()
    server.faults["/3.tar"] = [("slow", 0.5)]
    storage.will_need([3, 4, 5])
    until(lambda: server.requests)

    def child() -> None:
        right = all(is_right(storage, shard) for shard in range(8))
        sys.exit(not (right and storage.counters().reads == 8))

    process = FORK.Process(target=child)
    process.start()
    assert all(is_right(storage, shard) for shard in range(8))
    process.join(30)
    assert process.exitcode == 0
    assert sorted(whole(server)) == list(range(8))


def test_a_process_ends_while_its_threads_download(server, folder):
    server.always["/3.tar"] = ("stall", 40_000)
    program = f"""
        import time
        from pathlib import Path
        from fastvit_engine.storage import ShardStorage
        storage = ShardStorage(["{server.url("/3.tar")}"], [{SIZE + 3}], cache_dir=Path("{folder}"))
        storage.will_need([0])
        while storage.counters().downloaded < 40_000:
            time.sleep(0.01)
        print("over", flush=True)
    """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=30
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "over\n", "")


# Read-ahead


def test_read_ahead_in_order(server, open_storage, folder):
    storage = open_storage(threads=1)
    storage.will_need([5, 2, 7, 2, 0])
    until(lambda: cached(folder) == [0, 2, 5, 7])
    assert whole(server) == [5, 2, 7, 0]
    assert is_right(storage, 7)
    assert storage.counters().cache_misses == 0
    until(lambda: not any(thread.name == "shard download" for thread in threading.enumerate()))
    storage.will_need([0, 1])
    until(lambda: 1 in cached(folder))
    assert whole(server) == [5, 2, 7, 0, 1]


def test_a_read_goes_before_the_plan(server, open_storage):
    server.always = dict.fromkeys(FILES, ("slow", 0.2))
    storage = open_storage(threads=1)
    storage.will_need(range(7))
    until(lambda: server.requests)
    assert is_right(storage, 7)
    assert whole(server)[:2] == [0, 7]


def test_the_plan_is_bounded_by_the_cache_and_keeps_what_it_names(server, open_storage, folder, monkeypatch):
    monkeypatch.setattr(cache, "IDLE_S", 0.0)
    storage = open_storage(cache_bytes=3 * SIZE + 100, threads=2)
    storage.will_need(range(8))
    until(lambda: cached(folder) == [0, 1, 2])
    assert is_right(storage, 6)  # no room beside the plan: by range
    assert cached(folder) == [0, 1, 2]
    storage.will_need([2, 3, 4, 5])
    until(lambda: cached(folder) == [2, 3, 4])
    assert 5 not in whole(server)


def test_the_plan_waits_for_room_that_others_still_use(server, open_storage, folder):
    open_storage(cache_bytes=2 * SIZE + 100).read(0, 0, 10)
    open_storage(cache_bytes=2 * SIZE + 100).read(1, 0, 10)
    storage = open_storage(cache_bytes=2 * SIZE + 100)
    storage.will_need([2, 3])
    time.sleep(0.2)
    assert cached(folder) == [0, 1]
    assert is_right(storage, 4)  # meanwhile reads are not held up
    set_last_use(folder, {0: 1000, 1: 1000})
    until(lambda: cached(folder) == [2, 3])


def test_the_plan_is_cancelled(server, open_storage, folder):
    server.always = dict.fromkeys(FILES, ("slow", 1))
    storage = open_storage(threads=2)
    storage.will_need(range(8))
    until(lambda: len(server.requests) == 2)
    storage.will_need([1])
    until(lambda: cached(folder) == [1])
    assert parts(folder) == []
    assert sorted(whole(server)) == [0, 1]
    storage.will_need([2, 3])
    until(lambda: len(server.requests) == 4)
    storage.close()
    until(lambda: not any(thread.name == "shard download" for thread in threading.enumerate()))
    assert (cached(folder), parts(folder)) == ([1], [])


def test_a_failure_of_the_read_ahead_is_raised_by_the_read_that_needs_the_shard(server, open_storage, folder):
    server.always["/3.tar"] = ("status", 404)
    storage = open_storage(threads=1)
    storage.will_need([3, 4])
    until(lambda: cached(folder) == [4])
    assert is_right(storage, 4)
    for _ in range(2):
        with pytest.raises(UserError, match=r"/3\.tar cannot be read \(HTTP 404"):
            storage.read(3, 0, 10)
    assert whole(server) == [3, 4]


def test_a_passing_failure_of_the_read_ahead_is_tried_again_by_the_read(server, open_storage, folder):
    server.faults["/3.tar"] = [("status", 503)] * 3
    storage = open_storage(threads=1, retries=2)
    storage.will_need([3, 4])
    until(lambda: cached(folder) == [4])
    assert is_right(storage, 3)


def test_a_defect_in_the_download_is_not_lost(open_storage, monkeypatch):
    storage = open_storage()
    monkeypatch.setattr(storage, "_source", lambda url: 1 / 0)
    with pytest.raises(RuntimeError, match="the download of shard 3 failed") as error:
        storage.read(3, 0, 10)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
