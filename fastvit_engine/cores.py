"""How many CPU cores this process may use: fewer than the machine has, in a container and in a job of a scheduler."""

import contextlib
import os
from pathlib import Path


def cores_here(system: Path = Path("/")) -> int:
    """Cores by affinity and by the CPU quota of the control groups of this process; at least 1.

    system: the root that /proc and /sys are below.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(int, _quotas(system))]))


def _quotas(system: Path) -> list[float]:
    """The limits, in cores, of each control group that this process is in, of either version."""
    groups = system / "sys/fs/cgroup"
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = groups / controllers if controllers else groups
        for folder in _upwards(top, path):
            with contextlib.suppress(OSError, ValueError):
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if quota != "max" and int(quota) > 0:
                    found.append(int(quota) / int(period))
    return found


def _upwards(top: Path, path: str) -> list[Path]:
    """The folders of a group and of those above it; a container sees its own group as `top`."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
