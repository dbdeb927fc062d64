"""Starting the processes of a run on this machine, and reading the environment that a cluster launcher prepared."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from types import FrameType

from fastvit_engine.errors import UserError

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ERROR_SHOWN = "FASTVIT_ERROR_SHOWN"  # a path: the first failing process creates it and speaks for all


def launched_by_cluster(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether torchrun or its like started this process as one rank of a job. UserError if only half-way.

    Adds torchrun's variables where another launcher calls them otherwise.
    """
    environment.update(_in_torchrun_names(environment))
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return False
    missing = [name for name in LAUNCHER_VARIABLES if name not in environment]
    if missing:
        raise UserError(
            f"the launch environment sets {'RANK' if 'RANK' in environment else 'WORLD_SIZE'} but not "
            f"{', '.join(missing)}: start with torchrun, or unset them to run on this machine alone"
        )
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        try:
            numbers[name] = int(environment[name])
        except ValueError:
            raise UserError(f"environment variable {name} is {environment[name]!r}, not an integer") from None
    if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise UserError(
            f"environment variable RANK is {numbers['RANK']} but WORLD_SIZE is {numbers['WORLD_SIZE']}: "
            "ranks go from 0 to WORLD_SIZE - 1"
        )
    return True


def _in_torchrun_names(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would call the variables of SLURM's tasks and of DeepSpeed's launcher.

    A task of srun is a rank only where the job script also exports MASTER_ADDR: an interactive shell is none.
    """
    names: dict[str, str] = {}
    if {"MASTER_ADDR", "SLURM_PROCID", "SLURM_STEP_ID"} <= environment.keys() and "RANK" not in environment:
        slurm = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
        names = {ours: environment[theirs] for ours, theirs in slurm.items() if theirs in environment}
        counts: list[str] = []  # tasks of each node, written as "2(x3),1"
        for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
            count, _, times = part.partition("(x")
            counts += [count] * int(times.rstrip(")") or 1)
        if (node := int(environment.get("SLURM_NODEID", "0"))) < len(counts) and counts[node]:
            names["LOCAL_WORLD_SIZE"] = counts[node]
    elif "LOCAL_SIZE" in environment and "LOCAL_WORLD_SIZE" not in environment:
        names["LOCAL_WORLD_SIZE"] = environment["LOCAL_SIZE"]
    return names


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


def run_processes(arguments: Sequence[str], processes: int) -> int:
    """Runs `python -m fastvit_engine ARGUMENTS` once a rank and waits.

    The first process that fails ends the others. Returns its exit code, or 0 when all succeeded.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="fastvit-") as folder:
        children = []
        for rank in range(processes):
            environment = {**os.environ, **rank_environment(rank, processes, port)}
            environment[_ERROR_SHOWN] = str(Path(folder) / "shown")
            command = [sys.executable, "-m", "fastvit_engine", *arguments]
            children.append(subprocess.Popen(command, env=environment, preexec_fn=_die_with_parent))

        def stop(number: int, frame: FrameType | None) -> None:
            _end(children)
            raise SystemExit(128 + number)

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return _wait(children)
        finally:
            _end(children)
            for number, handler in previous.items():
                signal.signal(number, handler)


def _gpu_count() -> int:
    import torch  # here, because most commands need no more of this module than the reading of an environment

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def speaks_for_all() -> bool:
    """True for the first process of the job that fails (always, where nobody coordinates): it prints the error."""
    marker = os.environ.get(_ERROR_SHOWN)
    if marker is None:
        return True
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except OSError:
        return False
    return True


def _die_with_parent() -> None:
    """Asks Linux to end this child when its parent is killed, so that no rank is ever left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    running = list(children)
    while running:
        for child in list(running):
            code = child.poll()
            if code is None:
                continue
            running.remove(child)
            if code != 0:
                return code if code > 0 else 128 - code
        time.sleep(0.05)
    return 0


def _end(children: Sequence[subprocess.Popen[bytes]], grace_seconds: float = 5.0) -> None:
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + grace_seconds
    for child in children:
        try:
            child.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
