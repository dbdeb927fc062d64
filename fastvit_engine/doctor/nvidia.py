"""What NVIDIA's driver says of the GPUs, through `nvidia-smi`; without PyTorch, whose CUDA may be what is broken."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 20.0  # a driver in trouble may take longer, which is a finding
_FIELDS = ("index", "name", "uuid", "memory.total", "memory.free", "compute_mode", "driver_version")


@dataclass(frozen=True)
class DriverGpu:
    """A GPU as the driver has it."""

    index: int
    name: str
    uuid: str
    total: int  # bytes
    free: int
    compute_mode: str  # "Default", "Exclusive_Process", "Prohibited"


@dataclass(frozen=True)
class Driver:
    """The driver, and its GPUs."""

    version: str
    cuda: tuple[int, int] | None  # the newest CUDA that it can run
    gpus: tuple[DriverGpu, ...]


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU."""

    pid: int
    uuid: str  # of the GPU
    name: str
    memory: int  # bytes


class DriverTrouble(Exception):
    """Why the driver does not answer, as a clause."""


def ask_driver() -> Driver | None:
    """None if there is no driver. Raises DriverTrouble if there is one that does not answer."""
    if shutil.which("nvidia-smi") is None:
        if Path("/proc/driver/nvidia/version").exists():
            raise DriverTrouble("the driver is loaded, and nvidia-smi is not on the PATH")
        return None
    rows = _ask(f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
    gpus, version = [], ""
    for line in rows.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(_FIELDS):
            continue
        index, name, uuid, total, free, mode, version = cells
        gpus.append(DriverGpu(int(index), name, uuid, _mebibytes(total), _mebibytes(free), mode))
    newest = re.search(r"CUDA Version: *(\d+)\.(\d+)", _ask())
    return Driver(version, (int(newest[1]), int(newest[2])) if newest else None, tuple(gpus))


def processes_on_gpus() -> list[GpuProcess]:
    """Those that the driver shows; in a container often none, or those of this container. Raises DriverTrouble."""
    rows = _ask("--query-compute-apps=pid,gpu_uuid,used_memory,process_name", "--format=csv,noheader,nounits")
    found = []
    for line in rows.splitlines():
        cells = [cell.strip() for cell in line.split(",", 3)]
        if len(cells) == 4 and cells[0].isdigit():
            found.append(GpuProcess(int(cells[0]), cells[1], cells[3], _mebibytes(cells[2])))
    return found


def links_between_gpus() -> dict[tuple[int, int], str]:
    """How each pair of GPUs is connected: "NV18", "PIX", "SYS", ..., by `nvidia-smi topo -m`. Raises DriverTrouble."""
    rows = [line.split() for line in re.sub(r"\x1b\[[\d;]*m", "", _ask("topo", "-m")).splitlines()]
    head = next((row for row in rows if len(row) > 1 and re.fullmatch(r"GPU\d+", row[1]) or row[:1] == ["GPU0"]), [])
    columns = [int(cell[3:]) for cell in head if re.fullmatch(r"GPU\d+", cell)]
    links: dict[tuple[int, int], str] = {}
    for row in rows:
        if row is not head and row and re.fullmatch(r"GPU\d+", row[0]) and len(row) > len(columns):
            for column, cell in zip(columns, row[1:], strict=False):  # behind them: network cards, cores
                if cell != "X":
                    links[int(row[0][3:]), column] = cell
    return links


def _mebibytes(text: str) -> int:
    return int(text) * 2**20 if text.isdigit() else 0


def _ask(*arguments: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise DriverTrouble(f"nvidia-smi does not answer within {_SECONDS:.0f} s") from None
    except OSError as error:
        raise DriverTrouble(f"nvidia-smi does not run ({error.strerror})") from None
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[:300]
        raise DriverTrouble(f"nvidia-smi fails: {said or f'exit code {done.returncode}'}")
    return done.stdout
