"""Starts the processes of a run on this machine, and restarts them when they fail."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from fastvit_engine.distributed.environment import ERROR_SHOWN
from fastvit_engine.errors import EXIT_BAD_INPUT, EXIT_RESTART
from fastvit_engine.observe.events import record_event
from fastvit_engine.observe.run_folder import RunFolder

SAME_REQUEST_SECONDS = 2.0  # one signal may come twice: to the process group, and passed on by the parent
_GRACE_SECONDS = 10.0  # for ranks whose peer has failed, or that were asked twice: to say why, and to leave
_GRACE_AFTER_RESTART_CODE = 5.0  # likewise after exit code 75, when ranks have said why and leave together


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def processes_here(cpu_processes: int) -> int:
    """One process a GPU; without a GPU, `cpu_processes`."""
    return _gpu_count() or cpu_processes


def rank_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """The variables of one rank of a job that lives on this machine alone."""
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if _gpu_count() == 0:
        threads = max(1, (os.cpu_count() or 1) // processes)
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")  # host names need not resolve
    return environment


def run_with_restarts(arguments: Sequence[str], processes: int, run: RunFolder, max_restarts: int) -> int:
    """Runs `python -m fastvit_engine ARGUMENTS` once a rank, and again with `--resume auto` after a failure that a
    restart may heal, at most `max_restarts` times without a new checkpoint between them.

    SIGTERM, SIGUSR1, SIGINT and SIGQUIT are passed on to the ranks. Returns the exit code for the command.
    """
    # From the latest checkpoint of this run, or anew where it has not come to one. The last --resume counts.
    command, resuming = list(arguments), [*arguments, "--resume", "auto"]
    requests = _Requests()
    with requests.passed_on():
        restarts, latest = 0, _latest_checkpoint(run)
        while True:
            outcome = run_processes(command, processes, requests)
            if not outcome.restartable:
                return outcome.exit_code
            if requests.first:
                print(f"fastvit: asked to leave, and not all was saved: {outcome.cause}", file=sys.stderr, flush=True)
                return EXIT_RESTART
            if _latest_checkpoint(run) != latest:
                restarts, latest = 0, _latest_checkpoint(run)
            if restarts == max_restarts:
                tried = f" after {restarts} restarts without a new checkpoint" if restarts else ""
                print(f"fastvit: giving up{tried}: {outcome.cause}", file=sys.stderr, flush=True)
                return outcome.exit_code
            restarts += 1
            message = f"starting again ({restarts} of {max_restarts}): {outcome.cause}"
            record_event(run, "restart", message, attempt=restarts)
            print(f"fastvit: {message}", file=sys.stderr, flush=True)
            command = resuming


@dataclass(frozen=True)
class Outcome:
    """How the processes ended: exit codes by rank, a negative one being the number of the signal that killed it.

    Only of those that ended by themselves; once one has failed, the others have a few seconds to do so.
    """

    codes: Mapping[int, int]

    @property
    def exit_code(self) -> int:
        """Of the whole job. Bad input and a request to leave win over failures that follow from them."""
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


def run_processes(arguments: Sequence[str], processes: int, requests: "_Requests | None" = None) -> Outcome:
    """Runs `python -m fastvit_engine ARGUMENTS` once a rank and waits; the first that fails ends the others."""
    # Here and not in rank 0, so that the others can still tell of its end; and no port can be lost to another program.
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="fastvit-") as folder:
        children: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(processes):
                environment = {**os.environ, **rank_environment(rank, processes, store.port)}
                environment["LOCAL_WORLD_SIZE"] = str(processes)
                environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # so that rank 0 connects, too
                environment[ERROR_SHOWN] = str(Path(folder) / "shown")
                command = [sys.executable, "-m", "fastvit_engine", *arguments]
                children.append(subprocess.Popen(command, env=environment, preexec_fn=_die_with_parent))
            return _wait(children, requests or _Requests())
        finally:
            for child in children:
                child.kill()  # reaches a process that has been stopped, too
                child.wait()


class _Requests:
    """Signals that this process receives while the ranks are running."""

    def __init__(self) -> None:
        self._children: Sequence[subprocess.Popen[bytes]] = ()
        self.first: float | None = None  # when the first request to leave came
        self.at_once: float | None = None  # when the second came

    @contextmanager
    def passed_on(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGQUIT)
        previous = {number: signal.signal(number, self._pass_on) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def pass_on_to(self, children: Sequence[subprocess.Popen[bytes]]) -> None:
        """From now on; a request that has come already reaches them at once."""
        self._children = children
        if self.first:
            self._send(signal.SIGTERM)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGQUIT:
            self._send(number)
            return
        if self.first is None:
            self.first = time.monotonic()
        elif time.monotonic() - self.first > SAME_REQUEST_SECONDS:
            self.at_once = self.at_once or time.monotonic()
        self._send(number)

    def _send(self, number: int) -> None:
        for child in self._children:
            child.send_signal(number)


def _gpu_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _die_with_parent() -> None:
    """Asks Linux to end this child when its parent is killed, so that no rank is ever left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def _wait(children: Sequence[subprocess.Popen[bytes]], requests: _Requests) -> Outcome:
    requests.pass_on_to(children)
    codes: dict[int, int] = {}
    patience = float("inf")  # until when the ranks that are still there may end by themselves
    while len(codes) < len(children) and time.monotonic() < patience:
        for rank, child in enumerate(children):
            if rank not in codes and child.poll() is not None:
                codes[rank] = child.returncode
                if child.returncode != 0:
                    grace = _GRACE_AFTER_RESTART_CODE if child.returncode == EXIT_RESTART else _GRACE_SECONDS
                    patience = min(patience, time.monotonic() + grace)
        if requests.at_once:
            patience = min(patience, requests.at_once + _GRACE_SECONDS)
        time.sleep(0.05)
    if requests.at_once:
        codes |= {rank: -signal.SIGKILL for rank in range(len(children)) if rank not in codes}
    return Outcome(codes)


def _latest_checkpoint(run: RunFolder) -> str:
    pointer = run.checkpoints / "latest"
    return pointer.read_text() if pointer.exists() else ""
