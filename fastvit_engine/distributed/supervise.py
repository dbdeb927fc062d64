"""Starts the processes of a job on this machine, passes signals on to them, and says what their exit codes mean."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from fastvit_engine.cores import cores_here
from fastvit_engine.distributed.environment import ERROR_SHOWN
from fastvit_engine.distributed.process import die_with_parent
from fastvit_engine.distributed.store import JobStore
from fastvit_engine.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, EXIT_RESTART

SAME_REQUEST_SECONDS = 2.0  # one signal may come twice: to the process group, and passed on by the parent
# What asks a run to leave. SIGHUP comes when its terminal or its ssh connection closes; nohup makes it ignore that.
REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_GRACE_SECONDS = 10.0  # for ranks whose peer has failed, or that were asked twice: to say why, and to leave
_POLL_SECONDS = 0.02
_GRACE_AFTER_RESTART_CODE = 5.0  # likewise after exit code 75, when ranks have said why and leave together


class Rank(Protocol):
    """A process of the job, as `subprocess.Popen` has it."""

    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def kill(self) -> None: ...


Start = Callable[[Mapping[str, str]], Rank]  # of the variables of a rank, the process


def gpu_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rank_environment(
    rank: int, processes: int, port: int, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The variables of one rank of a job that runs on this machine alone.

    Those of `environment` take precedence if they do not depend on the rank.
    """
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # Reachable from here only; and host names need not resolve. "=": this name, not all that begin so.
    for name, interface in {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}.items():
        variables[name] = environment.get(name, interface)
    if gpu_count() == 0:
        threads = max(1, cores_here() // processes)
        variables["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", str(threads))
    return variables


@contextmanager
def start_ranks(
    command: Sequence[str | Path] | Start,
    processes: int,
    environment: Mapping[str, str] = os.environ,
    **options: Any,
) -> Iterator[list[Any]]:
    """Starts `command` once per rank, and kills the processes that are left when the block ends.

    `command`: or what starts it. `environment` is that of each rank, but for what makes it a rank; `options` are those
    of `subprocess.Popen`, which the ranks are then. The processes also end with the thread that starts them.
    """
    start = command if callable(command) else _start_of(command, options)
    # Here and not in rank 0, so that the others can still tell of its end; and no port can be lost to another program.
    store = JobStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="fastvit-") as folder:
        children: list[Rank] = []
        common = {
            "LOCAL_WORLD_SIZE": str(processes),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # so that rank 0 connects, too
            ERROR_SHOWN: str(Path(folder) / "shown"),
        }
        try:
            for rank in range(processes):
                variables = {**environment, **rank_environment(rank, processes, store.port, environment), **common}
                children.append(start(variables))
            yield children
        finally:
            for child in children:
                child.kill()  # reaches a process that has been stopped, too
            for child in children:
                child.wait()


def _start_of(command: Sequence[str | Path], options: Mapping[str, Any]) -> Start:
    return lambda variables: subprocess.Popen(command, env=dict(variables), preexec_fn=die_with_parent, **options)


@dataclass(frozen=True)
class LaunchOutcome:
    """How the processes ended: exit codes by rank, a negative one being the number of the signal that killed it.

    Only of those that ended by themselves; once one has failed, the others have a few seconds to do so.
    """

    codes: Mapping[int, int]

    @property
    def exit_code(self) -> int:
        """Of the whole job. Bad input and a request to leave take precedence over failures that follow from them."""
        codes = self.codes.values()
        for code in (EXIT_BAD_INPUT, *sorted(code for code in codes if code > 0 and code != EXIT_RESTART)):
            if code in codes:
                return code
        killed = [-code for code in codes if code < 0]
        return 128 + killed[0] if killed else max(codes)

    @property
    def restartable(self) -> bool:
        return any(self.codes.values()) and all(code in (0, EXIT_RESTART) or code < 0 for code in self.codes.values())

    @property
    def cause(self) -> str:
        """Why a restart is needed."""
        killed = {rank: signal.Signals(-code).name for rank, code in self.codes.items() if code < 0}
        if killed:
            return "; ".join(f"rank {rank} was killed by {name}" for rank, name in killed.items())
        ranks = ", ".join(str(rank) for rank, code in self.codes.items() if code == EXIT_RESTART)
        return f"exit code {EXIT_RESTART} of rank {ranks}"


def cluster_exit_code(codes: Set[int]) -> int:
    """The exit code of one node's processes for its cluster, which knows nothing but "start the same command again".

    Unlike `LaunchOutcome.exit_code`, whatever is neither bad input nor a request to leave asks for a restart: on many
    machines a traceback or a signal often comes from a machine that the cluster will replace.
    """
    return next((code for code in (EXIT_BAD_INPUT, EXIT_PREEMPTED) if code in codes), EXIT_RESTART)


class Requests:
    """Signals to this process while ranks are running: those of REQUESTS and SIGQUIT are passed on to them."""

    def __init__(self) -> None:
        self._children: Sequence[Rank] = ()
        self._terminals: list[int] = []
        self.first: float | None = None  # when the first request to leave came
        self.at_once: float | None = None  # when the second came

    @contextmanager
    def passed_on(self) -> Iterator[None]:
        self._terminals = terminals()
        previous = {number: signal.signal(number, self._pass_on) for number in not_ignored((*REQUESTS, signal.SIGQUIT))}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def pass_on_to(self, children: Sequence[Rank]) -> None:
        """Passes signals on to `children` from now on; a request that has come already reaches them at once."""
        self._children = children
        if self.first:
            self._send(signal.SIGTERM)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGQUIT:
            self._send(number)
            return
        if number == signal.SIGHUP:
            silence(self._terminals)
        if self.first is None:
            self.first = time.monotonic()
        elif time.monotonic() - self.first > SAME_REQUEST_SECONDS:
            self.at_once = self.at_once or time.monotonic()
        self._send(number)

    def _send(self, number: int) -> None:
        for child in self._children:
            child.send_signal(number)


def wait_for_ranks(
    children: Sequence[Rank], requests: Requests, grace_after_kill: float | None = None
) -> LaunchOutcome:
    """Waits until all have ended, or, once one has failed or a second request has come, for some seconds more.

    grace_after_kill: so many, if a signal has ended the first.
    """
    requests.pass_on_to(children)
    codes: dict[int, int] = {}
    deadline = float("inf")  # until when the ranks that are left may end by themselves
    while len(codes) < len(children) and time.monotonic() < deadline:
        for rank, child in enumerate(children):
            if rank not in codes and (code := child.poll()) is not None:
                codes[rank] = code
                if code != 0:
                    deadline = min(deadline, time.monotonic() + _grace_after(code, grace_after_kill))
        if requests.at_once:
            deadline = min(deadline, requests.at_once + _GRACE_SECONDS)
        time.sleep(_POLL_SECONDS)
    if requests.at_once:
        codes |= {rank: -signal.SIGKILL for rank in range(len(children)) if rank not in codes}
    return LaunchOutcome(codes)


def _grace_after(code: int, grace_after_kill: float | None) -> float:
    """Seconds for the other ranks when one has ended with a code that is not 0."""
    if code < 0 and grace_after_kill is not None:
        return grace_after_kill
    return _GRACE_AFTER_RESTART_CODE if code == EXIT_RESTART else _GRACE_SECONDS


def not_ignored(numbers: Sequence[signal.Signals]) -> list[signal.Signals]:
    """Without SIGHUP if the process was started so that it ignores it (nohup)."""
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def terminals() -> list[int]:
    """Which of standard output and standard error are terminals."""
    return [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]


def silence(descriptors: Sequence[int]) -> None:
    """Sends what is written there nowhere: on a terminal that has closed, each line would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
