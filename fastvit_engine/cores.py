"""How many CPU cores this process may use: fewer than the machine has, in a container and in a job of a scheduler."""

import os
from pathlib import Path

from fastvit_engine.control_groups import cpu_quota


def cores_here(system: Path = Path("/")) -> int:
    """Whole cores that this process may use; at least 1. system: the root that /proc and /sys are below."""
    return max(1, int(core_share(system)))


def core_share(system: Path = Path("/")) -> float:
    """Cores by affinity and by the CPU quota of the control groups of this process. system: as of `cores_here`."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(system)
    return float(allowed) if quota is None else min(float(allowed), quota)
