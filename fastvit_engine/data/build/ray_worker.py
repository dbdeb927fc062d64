"""What runs in the processes of a Ray cluster: tasks, the check of their node, and the counts that they report."""

import contextlib
import os
import platform
import signal
import socket
import time
import traceback
import uuid
from collections import Counter as Totals
from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.actor import ActorHandle

import fastvit_engine
from fastvit_engine.data.build.parallel import Counter
from fastvit_engine.data.shards.archive import stamp_of
from fastvit_engine.data.shards.names import is_local
from fastvit_engine.errors import UserError
from fastvit_engine.files import is_alive

_REPORT_SECONDS = 0.5
_VISIBLE_SECONDS = 10.0  # within which a network file system shows a new file to another machine
_LIBRARIES = ("numpy", "pillow", "webdataset")  # that decide which bytes are written


class Token(NamedTuple):
    """A file in the shared folder that tells whether a node sees the same folder."""

    path: str
    content: str


class Admission(NamedTuple):
    """What must be true on a node before a task runs there."""

    identity: dict[str, str]  # versions, see `identity`
    umask: int
    folder: str  # where the command was started, which relative paths refer to
    reads: list[tuple[str, tuple[int, ...]]]  # path or URL, and what `seen` returned
    writes: Token | None


class Work(NamedTuple):
    """What all tasks of a map share, by reference: each process fetches it once."""

    map: str  # a name that no other map has
    admission: ray.ObjectRef  # of Admission
    function: ray.ObjectRef  # of a function of one task
    progress: ActorHandle  # of Progress


class Outcome(NamedTuple):
    """The result of a task, or why there is none. Exceptions are not raised: Ray would show them in its own words."""

    result: Any = None
    user_error: str | None = None
    crash: str | None = None  # a traceback
    lost: str | None = None  # a part of the cluster that the task needs


@cache
def identity() -> dict[str, str]:
    """Versions of what decides the bytes that are written, and a hash of the engine's code."""
    root = Path(fastvit_engine.__file__).parent
    code = blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        code.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    libraries = {name: metadata.version(name) for name in _LIBRARIES}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"fastvit-engine": fastvit_engine.__version__, "python": python, **libraries, "code": code.hexdigest()}


def seen(path: str) -> tuple[int, ...]:
    """What identifies a path or URL: bytes and time of change of a file, nothing of a folder. Raises OSError."""
    return () if is_local(path) and os.path.isdir(path) else stamp_of(path)


def run_task(work: Work, number: int, task: Any) -> Outcome:
    """Runs one task, on a node that has been checked."""
    try:
        if not _report.begin(work, number):
            return Outcome(lost="its map has ended")
        _admit(work.admission)
        result = _function(work.function)(task)
        _report.end()
        return Outcome(result)
    except UserError as error:
        return Outcome(user_error=str(error))
    except ray.exceptions.RayError as error:
        return Outcome(lost=str(error).partition("\n")[0])
    except Exception:
        return Outcome(crash=traceback.format_exc())


def check_node(admission: list[ray.ObjectRef]) -> str | None:
    """What is wrong with this node, in one sentence; None if it is fit for tasks. The list keeps the reference one."""
    try:
        _admit(admission[0])
    except UserError as error:
        return str(error)
    return None


def end_processes(processes: list[int], seconds: float) -> None:
    """Kills these processes of this node, whose tasks are no longer wanted, and waits until they have ended."""
    others = [process for process in processes if process != os.getpid()]
    for process in others:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    deadline = time.monotonic() + seconds
    while any(is_alive(process) for process in others) and time.monotonic() < deadline:
        time.sleep(0.02)


def node_name() -> str:
    """The name of this process's node, for people."""
    return f"{socket.gethostname()} ({ray.get_runtime_context().get_node_id()[:8]})"


# ---- the check of a node


_admitted: set[str] = set()


def _admit(reference: ray.ObjectRef) -> None:
    """Raises UserError unless this node is fit. Nodes that join later are checked by their first task."""
    if reference.hex() in _admitted:
        return
    admission: Admission = ray.get(reference)
    _check_identity(admission.identity)
    os.umask(admission.umask)
    with contextlib.suppress(OSError):  # if it is not here, relative paths are not found below
        os.chdir(admission.folder)
    for path, expected in admission.reads:
        try:
            found = seen(path)
        except (OSError, UserError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise UserError(
                f"node {node_name()} of the Ray cluster cannot read {path} ({reason}): mount it there under the same "
                "name, or take the node out of the cluster"
            ) from error
        if found != expected:
            raise UserError(
                f"node {node_name()} of the Ray cluster has another {path} than this machine: let all nodes mount the "
                "same file system"
            )
    if admission.writes is not None:
        _check_shared(admission.writes)
    _admitted.add(reference.hex())


def _check_identity(expected: dict[str, str]) -> None:
    here = identity()
    for name, version in expected.items():
        if here[name] == version:
            continue
        difference = (
            f"other code of fastvit-engine {here['fastvit-engine']} than"
            if name == "code"
            else f"{name} {here[name]} and not the {version} of"
        )
        raise UserError(
            f"node {node_name()} of the Ray cluster has {difference} the machine of this command: install the same "
            "version on every node, since shards might differ"
        )


def _check_shared(token: Token) -> None:
    path = Path(token.path)
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if path.read_text() == token.content:
                break
        if not path.parent.is_dir() or time.monotonic() > deadline:
            raise UserError(
                f"node {node_name()} of the Ray cluster does not see the folder {path.parent} of this machine: put the "
                "output on a file system that every node mounts under the same name"
            )
        time.sleep(0.1)
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        own.write_text(token.content)
        own.unlink()
    except OSError as error:
        raise UserError(
            f"node {node_name()} of the Ray cluster cannot write to {path.parent} ({error.strerror}): make it writable "
            "there, or take the node out of the cluster"
        ) from error


# ---- functions and counts


def fetch(reference: ray.ObjectRef) -> Any:
    """`ray.get` for what an actor returns, whose type Ray does not know."""
    return ray.get(reference)


_loaded: dict[str, Callable[[Any], Any]] = {}


def _function(reference: ray.ObjectRef) -> Callable[[Any], Any]:
    """Fetches the function of a map once per process, and forgets that of the map before."""
    if reference.hex() not in _loaded:
        _loaded.clear()
        _loaded[reference.hex()] = ray.get(reference)
    return _loaded[reference.hex()]


class Progress:
    """An actor that holds what the tasks of the current map have counted.

    Tasks report absolute numbers, so that those of a task that died are replaced when it is run again.
    """

    def __init__(self) -> None:
        self._map = ""
        self._by_task: dict[int, dict[str, int]] = {}
        self._totals: Totals[str] = Totals()
        self._processes: dict[int, tuple[str, int]] = {}

    def start(self, map: str) -> None:
        """Begins another map."""
        self._map, self._by_task, self._totals, self._processes = map, {}, Totals(), {}

    def begin(self, map: str, number: int, node: str, process: int) -> bool:
        """Remembers the process that runs a task; False if the map has ended, and the task must not run."""
        if map != self._map:
            return False
        self._processes[number] = node, process
        return True

    def stop(self, numbers: list[int]) -> dict[str, list[int]]:
        """Ends the map: no more of its tasks begin. Returns the processes that have begun these tasks, by node."""
        self._map = ""
        by_node: dict[str, list[int]] = {}
        for node, process in (self._processes[number] for number in numbers if number in self._processes):
            by_node.setdefault(node, []).append(process)
        return by_node

    def report(self, map: str, number: int, counts: dict[str, int]) -> None:
        """Replaces the counts of a task."""
        if map == self._map:
            self._totals.subtract(self._by_task.get(number, {}))
            self._totals.update(counts)
            self._by_task[number] = counts

    def totals(self) -> dict[str, int]:
        """The sum over all tasks, by counter."""
        return dict(self._totals)


class _Report:
    """What the current task of this process has counted."""

    def __init__(self) -> None:
        self._work: Work | None = None

    def begin(self, work: Work, number: int) -> bool:
        """Whether the task may run: its map has not ended. Raises RayError."""
        self._work, self._number, self._counts = work, number, Totals[str]()
        self._sent_at = time.monotonic()
        node = ray.get_runtime_context().get_node_id()
        return bool(fetch(work.progress.begin.remote(work.map, number, node, os.getpid())))

    def add(self, key: str, count: int) -> None:
        self._counts[key] += count
        if time.monotonic() - self._sent_at >= _REPORT_SECONDS:
            self._send()

    def total(self, key: str) -> int:
        """Over all tasks of the map. Raises RayError."""
        assert self._work is not None
        ray.get(self._send())
        totals: dict[str, int] = fetch(self._work.progress.totals.remote())
        return totals.get(key, 0)

    def end(self) -> None:
        """Sends the final counts. Raises RayError."""
        ray.get(self._send())

    def _send(self) -> ray.ObjectRef:
        assert self._work is not None
        self._sent_at = time.monotonic()
        return self._work.progress.report.remote(self._work.map, self._number, dict(self._counts))


_report = _Report()


class TaskCounter(Counter):
    """The counter of the command's process, as tasks see it."""

    def __init__(self, state: tuple[str, int]) -> None:
        self._key, self._before = state  # its name, and its value when the map began

    def add(self, count: int = 1) -> None:
        _report.add(self._key, count)

    @property
    def value(self) -> int:
        return self._before + _report.total(self._key)
