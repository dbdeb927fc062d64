"""Checks what this host and its container allow: cores, memory, shared memory, open files, its name and its ports."""

import ipaddress
import os
import resource
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from fastvit_engine.control_groups import MemoryLimit, memory_limit
from fastvit_engine.cores import core_share
from fastvit_engine.doctor.findings import Finding, Group
from fastvit_engine.observe.units import counted, format_bytes

_group = Group("host")
_SHARED = 2**24  # bytes of /dev/shm for locks and queues of data workers
_SHARED_BY_GPUS = 2**30  # and for NCCL between the GPUs of a node
_LEAST_MEMORY = 2 * 2**30  # bytes per process
_FEW_FILES = 1024
_PORTS = (29400, 29500)  # of launch/, and of torchrun and DeepSpeed


def check_host(processes: int, workers: int, gpus: int) -> Iterator[Finding]:
    """processes: of a run on this node. workers: of each process. gpus: of this node."""
    yield from _check_cores(core_share(), processes, workers)
    yield _check_memory(memory_limit(), processes)
    yield check_shared_memory(Path("/dev/shm"), gpus)
    yield _check_open_files()
    yield from _check_pinning()
    yield _check_name()
    yield from _check_ports()


def _check_cores(cores: float, processes: int, workers: int) -> Iterator[Finding]:
    count, figures = os.cpu_count() or 1, {"cores": cores}
    if cores < count:
        yield _group.note(
            "cores",
            f"this process may use {cores:g} of {count}: its scheduler or container allows no more",
            "ask for more if data is slow (SLURM: --cpus-per-task; Kubernetes: resources.limits.cpu)",
            figures=figures,
            speed="cores",
        )
    else:
        yield _group.ok("cores", f"{cores:g}", figures=figures, speed="cores")
    asked = processes * (1 + workers)
    if asked > 2 * cores:
        yield _group.note(
            "data workers",
            f"{counted(processes, 'process', 'processes')} with {counted(workers, 'data worker')} each share {cores:g} "
            "cores",
            f"set data.num_workers to {max(0, int(cores / processes) - 1)}, or ask for more cores, if data is slow",
        )


def _check_memory(allowed: MemoryLimit | None, processes: int) -> Finding:
    known = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(known[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    of = f"of {format_bytes(total)}"
    if allowed is not None and allowed.limit < total:
        free = max(0, min(free, allowed.limit - allowed.used))
        of = f"of {format_bytes(allowed.limit)} that the container or job may use"
    found, figures = f"{format_bytes(free)} {of} free", {"free_bytes": float(free)}
    need = processes * _LEAST_MEMORY
    if free < need:
        return _group.warning(
            "memory",
            f"{found}: {counted(processes, 'process', 'processes')} with data workers take about {format_bytes(need)}",
            "end other programs, ask for more memory (SLURM: --mem), or lower data.num_workers",
            figures=figures,
            speed="free_bytes",
        )
    return _group.ok("memory", found, figures=figures, speed="free_bytes")


def check_shared_memory(path: Path, gpus: int) -> Finding:
    """path: /dev/shm."""
    advice = "mount a larger one (docker run --shm-size 16g; Kubernetes: a memory volume at /dev/shm)"
    if not path.is_dir():
        found = f"there is no {path}: data workers cannot start, nor can NCCL connect the GPUs of a node"
        return _group.problem("shared memory", found, advice)
    disk = os.statvfs(path)
    free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    if not os.access(path, os.W_OK | os.X_OK):
        found = f"this user may not write to {path}: data workers cannot start"
        return _group.problem("shared memory", found, f"sudo chmod 1777 {path}")
    need = _SHARED_BY_GPUS if gpus > 1 else _SHARED
    found = f"{format_bytes(free)} of {format_bytes(total)} free in {path}"
    if free < need:
        why = f"NCCL needs it between {gpus} GPUs" if gpus > 1 else "data workers need some"
        return _group.warning("shared memory", f"{found}: {why}", advice)
    return _group.ok("shared memory", found)


def _check_open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _group.ok("open files", "no limit")
    if soft >= _FEW_FILES:
        return _group.ok("open files", f"{soft:,} per process")
    most = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard}"
    found = f"a process may open {soft:,}: only {soft // 2} shards stay open, and many connections fail"
    raised = hard == resource.RLIM_INFINITY or hard > soft
    advice = f"ulimit -n {most}" if raised else f"ask the administrator for more: the hard limit is {hard} too"
    return _group.warning("open files", found, advice)


def _check_pinning() -> Iterator[Finding]:
    """InfiniBand's driver locks memory, and some images of machines let users lock next to none."""
    cards = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    if not cards:
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= 2**30:
        yield _group.ok("locked memory", f"enough for InfiniBand ({', '.join(cards)})")
    else:
        yield _group.warning(
            "locked memory",
            f"a process may lock {format_bytes(soft)}: NCCL cannot use InfiniBand ({', '.join(cards)})",
            "ulimit -l unlimited (docker run --ulimit memlock=-1)",
        )


def _check_name(environment: Mapping[str, str] = os.environ) -> Finding:
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except (socket.gaierror, UnicodeError):
        address = ""
    if address and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return _group.ok("host name", f"{name} is {address}")
    chosen = environment.get("GLOO_SOCKET_IFNAME")
    what = f"resolves to {address}, where no other host finds it" if address else "does not resolve"
    if chosen:
        return _group.ok("host name", f"{name} {what}; GLOO_SOCKET_IFNAME={chosen} is used in its place")
    return _group.note(
        "host name",
        f"{name} {what}: a run on several nodes would not start",
        "use the launchers in launch/, which set GLOO_SOCKET_IFNAME, or correct /etc/hosts",
    )


def _check_ports(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Those that launchers listen on; a launcher that has started this process uses its own."""
    if "MASTER_PORT" in environment:
        return
    taken = []
    for port in _PORTS:
        try:
            socket.create_server(("", port)).close()
        except OSError:
            taken.append(port)
    if taken:
        yield _group.note(
            "ports",
            f"{' and '.join(map(str, taken))} taken, perhaps by another run",
            "choose another one for the next: --head HOST:PORT of launch/torchrun/run.sh, or MASTER_PORT",
        )
    else:
        yield _group.ok("ports", f"{' and '.join(map(str, _PORTS))} are free")
