import os
import signal
import time

import pytest

from fastvit_engine.data.build.parallel import Counter, ordered_map, parallel_map
from fastvit_engine.errors import UserError


def test_every_task_once_whatever_the_number_of_workers():
    for workers in (1, 3, 9):
        done = Counter()

        def square(number: int, done: Counter = done) -> int:
            done.add()
            return number * number

        assert sorted(parallel_map(square, range(40), workers=workers)) == [(n, n * n) for n in range(40)]
        assert done.value == 40
    assert list(parallel_map(square, [], workers=2)) == []


def test_ordered_map_keeps_the_order_of_the_tasks():
    def slow_first(number: int) -> int:
        time.sleep(0.05 if number == 0 else 0)
        return -number

    assert list(ordered_map(slow_first, range(12), workers=3)) == [-n for n in range(12)]


def test_errors_of_users_and_of_programs():
    def refuse(number: int) -> None:
        raise UserError("this is wrong")

    def crash(number: int) -> None:
        raise KeyError("a bug")

    with pytest.raises(UserError, match="this is wrong"):
        list(parallel_map(refuse, range(4), workers=2))
    with pytest.raises(RuntimeError, match=r"(?s)in crash.*KeyError: 'a bug'"):
        list(parallel_map(crash, range(4), workers=2))


def test_no_worker_is_left_after_an_error_or_a_break():
    def tell(number: int) -> int:
        if number > 5:
            time.sleep(60)
        return os.getpid()

    results = parallel_map(tell, range(10), workers=2)
    workers = {pid for _, pid in (next(results) for _ in range(6))}
    results.close()
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


def test_a_killed_worker_is_an_error():
    def die(number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UserError, match="a worker process was killed, perhaps for lack of memory"):
        list(parallel_map(die, range(10), workers=2))


def test_workers_end_with_a_killed_parent(tmp_path):
    pid = os.fork()
    if pid == 0:
        os.setsid()

        def work(number: int) -> None:
            (tmp_path / str(os.getpid())).touch()
            time.sleep(60)

        list(parallel_map(work, range(2), workers=2))
        os._exit(0)
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 10
    alive = [int(path.name) for path in tmp_path.iterdir()]
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        alive = [worker for worker in alive if _runs(worker)]
    assert not alive


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
