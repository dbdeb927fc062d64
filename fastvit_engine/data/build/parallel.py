"""Maps a function over tasks in forked processes or by an executor, for the commands that make and check shards."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastvit_engine.cores import cores_here
from fastvit_engine.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

_POLL_SECONDS = 0.2
_fork = multiprocessing.get_context("fork")  # large arrays and closures reach the workers without a copy


def default_workers() -> int:
    """Returns the number of CPU cores that this process may use."""
    return cores_here()


class Counter:
    """A number that workers add to and the parent reads."""

    def __init__(self) -> None:
        self._value = _fork.Value("q", 0)

    def add(self, count: int = 1) -> None:
        with self._value.get_lock():
            self._value.value += count

    @property
    def value(self) -> int:
        return int(self._value.value)

    def set(self, value: int) -> None:
        """Replaces the number: for an executor, whose workers cannot reach it."""
        with self._value.get_lock():
            self._value.value = value


class Executor(Protocol):
    """Runs tasks elsewhere than in forked processes. Functions, tasks and results are pickled."""

    def check(self, reads: Sequence[str], writes: Path | None = None) -> None:
        """Raises UserError if a machine does not see the paths or URLs `reads`, or cannot write to a shared folder."""

    def map(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], while_waiting: Callable[[], None]
    ) -> Generator[tuple[Any, Any], None, None]:
        """What `parallel_map` promises."""


Workers = int | Executor  # forked processes, or an executor


def check_workers(workers: Workers | None, reads: Sequence[str], writes: Path | None = None) -> None:
    """`Executor.check`; forked processes see what this one sees."""
    if workers is not None and not isinstance(workers, int):
        workers.check(reads, writes)


def some_of(items: Sequence[Task], count: int = 8) -> list[Task]:
    """Up to `count` of the items, evenly spaced: a sample of paths for `check_workers`."""
    return [items[number * len(items) // count] for number in range(count)] if len(items) > count else list(items)


def parallel_map(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: Workers,
    while_waiting: Callable[[], None] = lambda: None,
) -> Generator[tuple[Task, Result], None, None]:
    """Yields (task, function(task)) as they finish, in no fixed order.

    Results are pickled; tasks and `function` are not, except by an executor. `while_waiting` is called a few times per
    second. UserErrors of `function` are raised here, and so is the death of a worker; all workers have ended when the
    iterator is exhausted, has raised or is closed.
    """
    if not isinstance(workers, int):
        yield from workers.map(function, tasks, while_waiting)
        return
    next_task = _fork.Value("q", 0)
    processes, open_ends = [], []
    try:
        for _ in range(min(workers, len(tasks))):
            receiver, sender = _fork.Pipe(duplex=False)
            process = _fork.Process(target=_work, args=(function, tasks, next_task, sender, os.getpid()), daemon=True)
            process.start()
            sender.close()  # the worker's copy is the only one: its death closes the pipe
            processes.append(process)
            open_ends.append(receiver)
        while open_ends:
            for ready in wait(open_ends, timeout=_POLL_SECONDS):
                receiver = next(end for end in open_ends if end is ready)
                try:
                    number, result, user_error, crash = receiver.recv()
                except EOFError:
                    raise UserError(
                        "a worker process was killed, perhaps for lack of memory: "
                        "run the same command again with fewer --workers"
                    ) from None
                if user_error is not None:
                    raise UserError(user_error)
                if crash is not None:
                    raise RuntimeError(f"a worker process failed:\n{crash}")
                if number is None:
                    open_ends.remove(receiver)
                    continue
                yield tasks[number], result
            while_waiting()
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def ordered_map(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: Workers,
    while_waiting: Callable[[], None] = lambda: None,
) -> Generator[Result, None, None]:
    """Like `parallel_map`, but the results come in the order of the tasks."""
    ready: dict[int, Result] = {}
    number = 0
    numbered = list(enumerate(tasks))
    results = parallel_map(partial(_call, function), numbered, workers=workers, while_waiting=while_waiting)
    with contextlib.closing(results):
        for (index, _), result in results:
            ready[index] = result
            while number in ready:
                yield ready.pop(number)
                number += 1


def _call(function: Callable[[Task], Result], numbered: tuple[int, Task]) -> Result:
    return function(numbered[1])


def _work(
    function: Callable[[Any], Any], tasks: Sequence[Any], next_task: Any, sender: Connection, parent: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    try:
        while True:
            with next_task.get_lock():
                number = next_task.value
                next_task.value += 1
            if number >= len(tasks):
                break
            sender.send((number, function(tasks[number]), None, None))
        sender.send((None, None, None, None))
    except UserError as error:
        sender.send((None, None, str(error), None))
    except BaseException:
        sender.send((None, None, None, traceback.format_exc()))


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)  # the parent was killed: the results have no reader
