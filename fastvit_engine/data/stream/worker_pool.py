"""Batches from decoding processes."""

import contextlib
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from itertools import chain, islice, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastvit_engine.data.stream.batch import ONE_CLASS, Batch, LabelForm, StageSeconds, empty_batch
from fastvit_engine.data.stream.batch_memory import BatchMemory, SharedMemory
from fastvit_engine.errors import RestartError, UserError

_CALM_SECONDS = 0.02
_CALM_PATIENCE = 0.5


class Request(NamedTuple):
    """A batch that is ordered."""

    what: Sequence[Any] | np.ndarray  # for `build`, as long as the batch
    shape: tuple[int, ...]  # of the images of one sample


class _Part(NamedTuple):
    """A part of an ordered batch, for one process."""

    slot: int  # of the batch in the shared memory
    first: int  # image of the batch
    what: Sequence[Any] | np.ndarray
    shape: tuple[int, ...]


class _Built(NamedTuple):
    """What a process has made of a part, but for its images."""

    labels: np.ndarray  # sent as an array: tensors would be shared, each through a file
    weights: np.ndarray
    rest: tuple[Any, ...]  # of a Batch


Build = Callable[[Any, Batch], Batch]  # (what is ordered, empty batch to fill) to the batch


def load(
    build: Build,
    requests: Iterable[Request],
    *,
    sizes: Sequence[int],
    largest: tuple[int, ...],
    num_workers: int,
    prefetch: int,
    pin_memory: bool = False,
    labels: LabelForm = ONE_CLASS,
) -> Iterator[Batch]:
    """The batches that are ordered, each built in parts by `num_workers` processes; 0: by this one.

    sizes: of the batches. largest: shape of the images of a sample that has the most numbers. Each process keeps
    `prefetch` parts ready. It writes images to where the batch is, in memory that it shares with this process: sending
    them would cost a fifth of the time of decoding small images, for new memory and its page faults. A batch is copied
    only into pinned memory, or if many are held at a time. A UserError of `build` is raised here as it is.
    """
    parts = max(1, min(num_workers, *sizes))  # of the smallest batch
    being_filled = 1 + -(-max(1, num_workers * prefetch) // parts)
    memory = SharedMemory(being_filled, max(sizes), largest)
    copies = BatchMemory(pin_memory, max(sizes))
    ordered: deque[list[_Part]] = deque()

    def in_parts() -> Iterator[_Part]:
        for what, shape in requests:
            ordered.append(list(_parts(what, shape, memory.take(), num_workers)))
            yield from ordered[-1]

    built = _received(_loader(_Builder(build, memory, labels), in_parts(), num_workers=num_workers, prefetch=prefetch))
    for first in built:
        (slot, _, _, shape), *others = ordered.popleft()
        yield _put_together([first, *islice(built, len(others))], memory, slot, shape, copies)


def _parts(what: Sequence[Any] | np.ndarray, shape: tuple[int, ...], slot: int, num_workers: int) -> Iterator[_Part]:
    """A part for each process, as equal as can be."""
    count = min(max(1, num_workers), len(what))
    bounds = [len(what) * number // count for number in range(count + 1)]
    for start, end in pairwise(bounds):
        yield _Part(slot, start, what[start:end], shape)


def _put_together(
    parts: Sequence[_Built], memory: SharedMemory, slot: int, shape: tuple[int, ...], copies: BatchMemory
) -> Batch:
    labels, weights = (torch.from_numpy(np.concatenate(arrays)) for arrays in list(zip(*parts, strict=True))[:2])
    images = memory.images(slot, 0, len(weights), shape)
    if copies.pin_memory:
        labels, weights = labels.pin_memory(), weights.pin_memory()
    if copies.pin_memory or not memory.may_be_held():
        images = copies.reserve(len(weights), *shape).copy_(images)
    memory.release(slot)
    keys, seeds, bad, seconds = zip(*(part.rest for part in parts), strict=True)
    return Batch(
        images,
        labels,
        weights,
        list(chain(*keys)),
        np.concatenate(seeds),
        tuple(chain(*bad)),
        reduce(StageSeconds.plus, seconds),
    )


def load_stream(chunks: IterableDataset, *, num_workers: int, prefetch: int) -> Iterator[Batch]:
    """The batches that each of `num_workers` processes gets from iterating over `chunks`, in turn.

    Each keeps `prefetch` of them ready. A UserError among them is raised here as it is.
    """
    yield from _received(_loader(chunks, None, num_workers=num_workers, prefetch=prefetch))


class _Builder(Dataset):
    """The side of `load` in the processes."""

    def __init__(self, build: Build, memory: SharedMemory, labels: LabelForm) -> None:
        self.build, self.memory, self.labels = build, memory, labels

    def __getitem__(self, part: _Part) -> _Built | UserError:
        images = self.memory.images(part.slot, part.first, len(part.what), part.shape)
        empty = empty_batch(len(part.what), image_size=0, labels=self.labels)._replace(images=images)
        try:
            batch = self.build(part.what, empty)
        except UserError as error:
            return error  # raising would wrap it in the worker's stack trace
        return _Built(batch.labels.numpy(), batch.weights.numpy(), batch[3:])


class _Loader(DataLoader):
    """A DataLoader that does not warn of more processes than cores: whether data is waited for is measured."""

    def check_worker_number_rationality(self) -> None:
        pass


def _loader(dataset: Dataset, sampler: Any, *, num_workers: int, prefetch: int) -> DataLoader:
    return _Loader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_unchanged,
        prefetch_factor=prefetch if num_workers else None,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # or the loader would draw from, and so move, the global generator
    )


def _start_worker(worker: int) -> None:
    _leave_signals_to_the_parent()
    sys.excepthook = _unless_the_parent_has_left


def _unless_the_parent_has_left(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Shows an error, but not that the parent ended, as Ctrl-C ends it, while a thread was handing it a batch."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, where)


def _leave_signals_to_the_parent() -> None:
    """Ignores the signals that the parent handles itself.

    They may reach every process of a job, and the parent still needs its data for the step that it finishes.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_IGN)


def _received(loader: DataLoader) -> Iterator[Any]:
    if loader.num_workers:
        _wait_for_calm()
    try:
        for item in loader:
            if isinstance(item, UserError):
                raise item
            yield item
    except RuntimeError as error:
        if (message := lost_worker(error)) is None:
            raise
        raise RestartError(message) from error


def _wait_for_calm() -> None:
    """Returns when no thread but Python's own has been running for a moment; at the latest after half a second.

    Before workers are forked: a thread of PyTorch's that lets go of the last collective operation's tensors may be
    asking Python for a thread state, and a child that CPython 3.11 forks meanwhile waits forever for a lock.
    """
    deadline, calm = time.monotonic() + _CALM_PATIENCE, 0
    while calm < 2 and time.monotonic() < deadline:
        time.sleep(_CALM_SECONDS / 2)
        calm = 0 if _foreign_threads_run() else calm + 1


def _foreign_threads_run() -> bool:
    """Whether any thread of this process that Python did not start is running, or waiting for a processor."""
    own = {str(thread.native_id) for thread in threading.enumerate()}
    for task in Path("/proc/self/task").glob("[0-9]*/stat"):  # none, except on Linux
        with contextlib.suppress(OSError):  # it has ended
            state = task.read_text().rpartition(")")[2].split()[0]
            if state == "R" and task.parent.name not in own:
                return True
    return False


_KILLED = re.compile(r"DataLoader worker \(pid (\d+)\) is killed by signal: (.+?)\. ")
_EXITED = re.compile(r"DataLoader worker \(pid (\d+)\) exited unexpectedly with exit code (\d+)")
# What a signal that ends a worker tells, and what to do.
_TOLD_BY_SIGNAL: dict[int | None, str] = {
    signal.SIGKILL: "as the kernel does when memory runs out (dmesg names the process then): if it happens again, "
    "lower data.num_workers, or give the machine or container more memory",
    signal.SIGBUS: "as when a file that is mapped into memory has no room or cannot be read: see `df /dev/shm`, "
    "through which data.order=stream hands over its batches, and dmesg for a disk that fails",
    **dict.fromkeys(
        (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE),
        "which is a crash in native code: to see where, decode in the training process, with --set data.num_workers=0 "
        "and PYTHONFAULTHANDLER=1 in the environment",
    ),
}
_SENT = "which the engine does not send to its workers: see what else on this machine ends processes"


def lost_worker(error: RuntimeError) -> str | None:
    """What to say of an error that reports a data worker's end: how it ended, as far as PyTorch knows.

    None for other errors. PyTorch raises it from a signal handler, at any point of the main thread. If that is while
    the loader waits for a batch, the loader raises another from it, which no longer says how.
    """
    if "DataLoader worker" not in str(error):
        return None
    known = f"{error}\n{error.__cause__}\n"
    if killed := _KILLED.search(known):
        number = next((number for number in signal.Signals if signal.strsignal(number) == killed[2]), None)
        name = killed[2] if number is None else number.name
        return f"data worker process {killed[1]} was killed by {name}, {_TOLD_BY_SIGNAL.get(number, _SENT)}"
    if exited := _EXITED.search(known):
        return (
            f"data worker process {exited[1]} ended with exit code {exited[2]} and no error: see what it printed before"
        )
    return "a data worker process has ended, and nothing says how: see what it printed before, and dmesg"


def _unchanged(item: Any) -> Any:
    return item
