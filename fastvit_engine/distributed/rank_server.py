"""A process that has imported what a rank needs, and forks ranks on request: a rank then starts without imports.

Run as `python -m fastvit_engine.distributed.rank_server`. It keeps one thread and opens no GPU, because neither
threads nor a CUDA context survive a fork: a rank touches its GPU after it was forked. If an import breaks this rule,
the server says so, and the launcher starts its ranks in the usual way.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from fastvit_engine.distributed.process import die_with_parent, name_process
from fastvit_engine.observe.units import counted

_STARTED_WITHIN = 300.0  # seconds: of imports, from a slow shared disk
_KILLED_WITHIN = 30.0  # seconds until a process that was killed is gone
# What asks processes to leave or to say where they are may come to the whole process group: it is for the ranks.
_FOR_RANKS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT)


class CannotFork(Exception):
    """The server is not able to fork ranks; the message says why."""


class ForkedRank:
    """A process that the server has forked, with what launchers use of `subprocess.Popen`."""

    def __init__(self, server: "RankServer", pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        self._server.listen(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self._server.listen(0.1)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Asks nothing of the server: a signal handler may call this in the middle of a message from it."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class RankServer:
    """The launcher's side: starts the server, and asks it for ranks that run `fastvit ARGUMENTS`."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int] = ()) -> None:
        """modules: to import. descriptors: that the ranks inherit, under the same numbers.

        Raises CannotFork if the server cannot start, or could not fork safely.
        """
        ours, theirs = Pipe()
        self._connection, self._ranks = ours, dict[int, ForkedRank]()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fastvit_engine.distributed.rank_server", str(theirs.fileno()), *modules],
                env=dict(environment),
                pass_fds=[theirs.fileno(), *descriptors],
                preexec_fn=die_with_parent,
            )
        answer = self._receive(_STARTED_WITHIN)
        if answer is None or answer["problem"]:
            self.close()
            raise CannotFork(answer["problem"] if answer else "it does not start")

    def fork(self, arguments: Sequence[str], environment: Mapping[str, str]) -> ForkedRank:
        """Starts a rank, whose environment is the server's with these variables over it. Raises CannotFork."""
        try:
            self._send({"arguments": list(arguments), "environment": dict(environment)})
        except OSError as error:
            raise CannotFork("it has ended") from error
        deadline = time.monotonic() + _STARTED_WITHIN
        while time.monotonic() < deadline and (answer := self._receive(deadline - time.monotonic())) is not None:
            if "pid" in answer:
                rank = self._ranks[answer["pid"]] = ForkedRank(self, answer["pid"])
                return rank
            self._note(answer)
        raise CannotFork("it does not answer")

    def listen(self, seconds: float) -> None:
        """Takes note of ranks that have ended, for which it waits so long if there is none yet."""
        while self._ranks and self._connection.poll(seconds):
            answer = self._receive(0)
            if answer is None:  # the server is gone, and Linux has killed its ranks
                for rank in self._ranks.values():
                    rank.returncode = -signal.SIGKILL
                self._ranks = {}
            else:
                self._note(answer)
            seconds = 0

    def close(self) -> None:
        """Ends the server, and with it every rank that is left."""
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _note(self, answer: Mapping[str, Any]) -> None:
        if (rank := self._ranks.pop(answer["ended"], None)) is not None:
            rank.returncode = answer["code"]

    def _send(self, message: Mapping[str, Any]) -> None:
        self._connection.send_bytes(json.dumps(message).encode())

    def _receive(self, seconds: float) -> Any:
        """The next message; None if none comes within that time, or the server has ended."""
        try:
            return json.loads(self._connection.recv_bytes()) if self._connection.poll(seconds) else None
        except (EOFError, OSError):
            return None


def serve(connection: Connection, modules: Sequence[str]) -> None:
    """Forks a rank for each request, and tells of each that ends, until the launcher is gone."""
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in _FOR_RANKS}
    for number in _FOR_RANKS:
        signal.signal(number, signal.SIG_IGN)
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what is there now is neither looked through by the ranks nor, for that, copied
    _send(connection, {"problem": why_not_fork()})
    with _ended_children() as ended:
        while True:
            readable = select.select([connection.fileno(), ended], [], [])[0]
            if ended in readable:
                os.read(ended, 4096)
                for pid, code in _reap():
                    _send(connection, {"ended": pid, "code": code})
            if connection.fileno() in readable:
                try:
                    request = json.loads(connection.recv_bytes())
                except EOFError:
                    return
                sys.stdout.flush()
                sys.stderr.flush()
                # One that comes before the rank has handlers of its own waits for them.
                signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_RANKS)
                server = os.getpid()
                if (pid := os.fork()) == 0:
                    break
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_RANKS)
                _send(connection, {"pid": pid})
    die_with_parent()
    if os.getppid() == server:  # else it was killed before the kernel was asked
        _run_rank(connection, handlers, request["arguments"], request["environment"])


def _run_rank(
    connection: Connection, handlers: Mapping[int, Any], arguments: Sequence[str], environment: Mapping[str, str]
) -> None:
    """What a rank does from its fork to its end. It leaves as any process does, through what it has imported."""
    connection.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_RANKS)
    os.environ.update(environment)
    name_process(f"fastvit rank {environment['RANK']}")
    sys.argv = ["fastvit", *arguments]
    raise SystemExit(importlib.import_module("fastvit_engine.cli").main())


def why_not_fork(process: Path = Path("/proc/self")) -> str | None:
    """Why this process cannot be forked safely; None if it can. process: its folder in /proc."""
    tasks = len(os.listdir(process / "task"))
    if tasks > 1:
        return f"what it imports has started {counted(tasks - 1, 'more thread')}, and a fork takes none along"
    for descriptor in os.listdir(process / "fd"):
        with contextlib.suppress(OSError):  # that of the listing itself, closed by now
            target = os.readlink(process / "fd" / descriptor)
            if target.startswith(("/dev/nvidia", "/dev/kfd", "/dev/dri/")):
                return f"what it imports has opened {target}, and a GPU that is open does not survive a fork"
    return None


@contextlib.contextmanager
def _ended_children() -> Iterator[int]:
    """A descriptor that becomes readable when a child has ended."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.signal(signal.SIGCHLD, lambda number, frame: None), signal.set_wakeup_fd(writer)
    try:
        yield reader
    finally:  # in a rank, too
        signal.set_wakeup_fd(before[1])
        signal.signal(signal.SIGCHLD, before[0])
        os.close(reader)
        os.close(writer)


def _reap() -> Iterator[tuple[int, int]]:
    """Process and exit code of each child that has ended."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found[0], os.waitstatus_to_exitcode(found[1])


def _send(connection: Connection, message: Mapping[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        serve(Connection(int(sys.argv[1])), sys.argv[2:])
