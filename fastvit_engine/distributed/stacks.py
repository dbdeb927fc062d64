"""Stack traces of all threads of all processes: `RUN/stacks/<time>-rank-N.txt`, on request and when a run hangs."""

import faulthandler
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fastvit_engine.files import atomic_write, atomic_writer
from fastvit_engine.observe.run_folder import RunFolder


def new_request() -> str:
    """Returns a name for one collection of stack traces: the time."""
    return datetime.now().strftime("%Y%m%dT%H%M%S-%f")[:-3]


def write_stacks(run: RunFolder, request: str, rank: int, headline: str) -> None:
    """Writes the Python stack traces of all threads of this process; works while others wait in C++ code.

    Next to them it writes the latest collective operations, as PyTorch's flight recorder has them, for `torchfrtrace
    --prefix <time>-collectives- RUN/stacks`.
    """
    run.stacks.mkdir(parents=True, exist_ok=True)
    path = run.stacks / f"{request}-rank-{rank}.txt"
    with atomic_writer(path) as file:
        file.write(f"{headline}\n\n".encode())
        file.flush()  # what follows goes past its buffer
        faulthandler.dump_traceback(file.fileno(), all_threads=True)
    collectives = _flight_record()
    if collectives:
        atomic_write(run.stacks / f"{request}-collectives-{rank}", collectives)


def requested(run: RunFolder) -> str:
    """Returns the request that `collect_stacks` has put into the run folder; empty if there is none, or no disk."""
    try:
        return _request_file(run).read_text()
    except OSError:
        return ""


def collect_stacks(run: RunFolder, processes: int, seconds: float) -> list[Path]:
    """Asks the running processes for their stack traces; returns the files that arrived within `seconds`, by rank."""
    request = new_request()
    run.stacks.mkdir(exist_ok=True)
    atomic_write(_request_file(run), request)
    files = [run.stacks / f"{request}-rank-{rank}.txt" for rank in range(processes)]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(file.exists() for file in files):
        time.sleep(0.1)
    _request_file(run).unlink(missing_ok=True)
    return [file for file in files if file.exists()]


def _request_file(run: RunFolder) -> Path:
    return run.stacks / "request"


def _flight_record() -> bytes:
    bindings: Any = torch._C._distributed_c10d
    dump = bindings._dump_nccl_trace if torch.cuda.is_available() else bindings._dump_fr_trace
    # Without the stack of each operation: to write those, PyTorch would import modules in a process that hangs.
    return dump(includeStackTraces=False)
