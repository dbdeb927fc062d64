"""What the control groups of this process allow it: a container or a scheduler may grant less than the machine has."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_NO_LIMIT = 2**60  # bytes: version 1 writes a huge number for none


class MemoryLimit(NamedTuple):
    """In bytes; of the group and its processes."""

    limit: int
    used: int


def cpu_quota(system: Path = Path("/")) -> float | None:
    """The least CPU quota of the groups around this process, in cores; None: no limit.

    system: the root that /proc and /sys are below.
    """
    quotas = []
    for group in _groups("cpu", system):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if not quota:  # version 1
            quota, period = (_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit(system: Path = Path("/")) -> MemoryLimit | None:
    """The least memory limit of the groups around this process; None: no limit. system: as of `cpu_quota`."""
    limits = []
    for group in _groups("memory", system):
        limit = _text(group / "memory.max") or _text(group / "memory.limit_in_bytes")
        used = _text(group / "memory.current") or _text(group / "memory.usage_in_bytes")
        if limit.isdecimal() and int(limit) < _NO_LIMIT:
            limits.append(MemoryLimit(int(limit), int(used) if used.isdecimal() else 0))
    return min(limits, key=lambda one: (one.limit, -one.used), default=None)


def _groups(controller: str, system: Path) -> Iterator[Path]:
    """The folders of this process's groups that may limit what `controller` controls, of either version, upwards.

    A container sees its own group as the top one, whatever the path says.
    """
    for line in _text(system / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield (system / "sys/fs/cgroup" / controllers).joinpath(*parts[:depth])


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
