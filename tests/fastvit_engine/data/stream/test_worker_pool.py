import builtins
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from itertools import cycle, islice

import numpy as np
import pytest
import torch

from fastvit_engine.data.stream import worker_pool
from fastvit_engine.data.stream.batch import Batch, BatchBuilder, StageSeconds, Workspace, empty_batch
from fastvit_engine.data.stream.worker_pool import Request, load, lost_worker
from fastvit_engine.errors import RestartError, UserError


def _build(request: np.ndarray, empty: Batch) -> Batch:
    empty.images[:] = torch.from_numpy(request).view(-1, 1, 1, 1)
    empty.labels[:] = torch.from_numpy(request)
    empty.weights[:] = 1
    return empty._replace(keys=[str(number) for number in request], seconds=StageSeconds(1, 2, 3))


def _load(build, requests, num_workers, sizes=(1, 2, 3, 4)):
    ordered = (Request(request, (3, 3, 3)) for request in requests)
    return load(build, ordered, sizes=sizes, largest=(3, 3, 3), num_workers=num_workers, prefetch=2)


@pytest.mark.parametrize("held", [0, 2, 3, 9])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_are_whole_and_in_order_and_stay_as_they_are_while_they_are_held(num_workers, held):
    requests = [np.arange(n, n + 1 + n % 4) for n in range(40)]
    last = deque(maxlen=held + 1)
    for number, batch in enumerate(_load(_build, requests, num_workers)):
        if number % 8 == 0:
            time.sleep(0.02)  # all that may be written ahead has been
        last.append((number, batch))
        for earlier, batch in last:
            assert batch.images.shape == (len(requests[earlier]), 3, 3, 3) and batch.images.dtype == torch.uint8
            assert batch.images[:, 1, 2, 0].tolist() == batch.labels.tolist() == requests[earlier].tolist()
            assert batch.keys == [str(n) for n in requests[earlier]]
            parts = min(max(num_workers, 1), len(batch.keys))
            assert batch.seconds == (parts, 2 * parts, 3 * parts) and batch.weights.tolist() == [1] * len(batch.keys)
    assert number == 39


@pytest.mark.parametrize("num_workers", [0, 2])
def test_memory_is_used_again_and_nothing_is_copied_if_few_batches_are_held(monkeypatch, num_workers):
    monkeypatch.setattr(worker_pool.BatchMemory, "reserve", lambda *arguments: pytest.fail("it would be a copy"))
    slots = set()
    for batch in _load(_build, [np.arange(4)] * 60, num_workers, sizes=[4]):
        before, slots = batch, slots | {batch.images.data_ptr()}  # two are held
    assert before is batch and len(slots) <= (2 if num_workers == 0 else 6)


class _Earliest:
    """Stands in for a DataLoader: parts are built as early as one may order them, which no scheduler promises."""

    num_workers = 0  # for `_received`

    def __init__(self, dataset, sampler, *, num_workers, prefetch):
        self.built, self.ahead = (dataset[part] for part in sampler), num_workers * prefetch

    def __iter__(self):
        ready = deque(islice(self.built, self.ahead))
        for part in self.built:
            ready.append(part)
            yield ready.popleft()
        yield from ready


@pytest.mark.parametrize("seed", range(30))
def test_there_are_always_enough_slots_whoever_holds_what(monkeypatch, seed):
    """With any sizes of micro-batches, processes and batches that are held in any way for any time."""
    monkeypatch.setattr(worker_pool, "_loader", _Earliest)
    rng = np.random.default_rng(seed)
    num_workers, prefetch = int(rng.integers(0, 18)), int(rng.integers(1, 4))
    sizes = rng.integers(1, rng.choice([2, 4, 40]), rng.integers(1, 5)).tolist()
    requests = [np.arange(number, number + size) for number, size in zip(range(60), cycle(sizes), strict=False)]
    most, held = rng.choice([1, 2, 4, 8]), []
    hold = [lambda images: images, lambda images: images[-1:], lambda images: images.numpy()[-1:]]
    ordered = (Request(request, (2, 2, 3)) for request in requests)
    batches = load(_build, ordered, sizes=sizes, largest=(2, 2, 3), num_workers=num_workers, prefetch=prefetch)
    for request, batch in zip(requests, batches, strict=True):
        assert batch.images[:, 0, 0, 0].tolist() == batch.labels.tolist() == request.tolist()
        held.append((request[-1], hold[rng.integers(len(hold))](batch.images)))
        while len(held) > most or (held and rng.random() < 0.3):
            held.pop(rng.integers(len(held)))
        assert all((images[-1] == last).all() for last, images in held)


def test_each_process_builds_a_part_of_every_batch():
    def build(request: np.ndarray, empty: Batch) -> Batch:
        return _build(request, empty)._replace(keys=[f"{os.getpid()} {number}" for number in request])

    for batch in _load(build, [np.arange(8)] * 3, 3, sizes=[8]):
        pids, numbers = zip(*(key.split() for key in batch.keys), strict=True)
        assert [*map(int, numbers)] == batch.images[:, 0, 0, 0].tolist() == [*range(8)]
        assert sorted(Counter(pids).values()) == [2, 3, 3] and len(set(pids)) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_may_differ_in_the_size_of_their_images(num_workers):
    requests = [Request(np.arange(n, n + 1 + n % 4), (side, side, 3)) for n, side in enumerate([2, 2, 5, 1, 3] * 4)]
    batches = load(_build, requests, sizes=[1, 2, 3, 4], largest=(5, 5, 3), num_workers=num_workers, prefetch=2)
    for request, batch in zip(requests, batches, strict=True):
        assert batch.images.shape == (len(request.what), *request.shape)
        assert batch.images[:, 0, 0, 2].tolist() == request.what.tolist() and batch.images.is_contiguous()
        assert (batch.images == batch.images[:, :1, :1, :1]).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_user_error_of_a_worker_comes_in_one_piece(num_workers):
    def build(request: np.ndarray, empty: Batch) -> Batch:
        if request[0] == 3:
            raise UserError("three")
        return _build(request, empty)

    batches = _load(build, [np.array([n]) for n in range(9)], num_workers)
    assert [int(next(batches).labels) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="^three$"):
        next(batches)


@pytest.mark.filterwarnings("error")
def test_more_processes_than_cores_are_no_warning_of_pytorch(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert len(list(_load(_build, [np.arange(3)], 2))) == 1


def test_workers_end_when_their_batches_are_dropped():
    before = len(multiprocessing.active_children())
    batches = _load(_build, (np.array([n % 100]) for n in range(10**9)), 2)
    next(batches)
    assert len(multiprocessing.active_children()) == before + 2
    batches.close()
    deadline = time.monotonic() + 10
    while len(multiprocessing.active_children()) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(multiprocessing.active_children()) == before


THREADS_OF_OPENMP = """
import threading, time, torch
from fastvit_engine.data.stream.worker_pool import _foreign_threads_run, _wait_for_calm

def until(state):
    deadline = time.monotonic() + 30
    while _foreign_threads_run() != state:
        assert time.monotonic() < deadline, state

def multiply():
    torch.set_num_threads(3)
    while not stop.is_set():
        torch.ones(500, 500) @ torch.ones(500, 500)

until(False)
stop = threading.Event()
thread = threading.Thread(target=multiply, daemon=True)
thread.start()
until(True)
stop.set()
thread.join()
until(False)
_wait_for_calm()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def _raised(error):
    try:
        raise getattr(builtins, error)(error)
    except Exception:
        return sys.exc_info()


@pytest.mark.parametrize(
    ("error", "shown"),
    [("BrokenPipeError", False), ("ConnectionResetError", False), ("EOFError", False), ("ValueError", True)],
)
def test_a_worker_is_silent_if_its_parent_ends_while_it_hands_over_a_batch(capsys, monkeypatch, error, shown):
    monkeypatch.setattr(worker_pool, "_leave_signals_to_the_parent", lambda: None)  # of this process they stay
    before = sys.excepthook
    try:
        worker_pool._start_worker(0)
        sys.excepthook(*_raised(error))  # as multiprocessing's thread calls it
    finally:
        sys.excepthook = before
    assert (error in capsys.readouterr().err) == shown


def test_threads_that_python_did_not_start_are_waited_for():
    done = subprocess.run([sys.executable, "-c", THREADS_OF_OPENMP], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_rows_that_are_not_filled_are_black_whatever_the_memory_held(make_config, photo):
    empty = empty_batch(3, 16)
    empty.images.fill_(200)
    builder = BatchBuilder(empty, make_config("x"), Workspace())
    bad = {"__key__": "k", "__url__": "u", "jpg": b"no photo", "cls": b"1"}
    builder.add(1, bad, lambda height, width: pytest.fail("there is no image to choose from"))
    batch = builder.build()
    assert (batch.images == 0).all() and batch.weights.sum() == 0 and batch.keys == ["", "k", ""]
    assert [sample.key for sample in batch.bad] == ["k"]


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (
            signal.SIGKILL,
            r"was killed by SIGKILL, as the kernel does when memory runs out \(dmesg .*lower data.num_work",
        ),
        (signal.SIGBUS, r"was killed by SIGBUS, as when a file .* mapped .* no room .*: see `df /dev/shm`"),
        (signal.SIGSEGV, r"was killed by SIGSEGV, which is a crash in native code: .*--set data.num_workers=0"),
        (signal.SIGUSR2, r"was killed by SIGUSR2, which the engine does not send to its workers"),
        (3, r"ended with exit code 3 and no error: see what it printed"),
    ],
)
def test_how_a_worker_ended_is_said_and_nothing_more(end, words):
    """Only SIGBUS tells of /dev/shm: the kernel kills by SIGKILL for lack of memory."""

    def build(request: np.ndarray, empty: Batch) -> Batch:
        if request[0] == 3:
            if isinstance(end, signal.Signals):
                signal.signal(end, signal.SIG_DFL) if end != signal.SIGKILL else None
                os.kill(os.getpid(), end)
            os._exit(end)
        return _build(request, empty)

    with pytest.raises(RestartError, match=rf"^data worker process \d+ {words}") as raised:
        list(_load(build, [np.array([n]) for n in range(9)], 1))
    assert ("/dev/shm" in str(raised.value)) == (end == signal.SIGBUS)


def test_a_lost_worker_is_told_from_other_errors():
    assert lost_worker(RuntimeError("shape mismatch")) is None
    assert lost_worker(RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly")).startswith(
        "a data worker process has ended, and nothing says how: "
    )
