"""What copies of the newest state take of the memory of a machine (checkpoint.in_memory), and whether it has that."""

from pathlib import Path

from fastvit_engine.config import Config
from fastvit_engine.control_groups import memory_limit
from fastvit_engine.sizing.needs import checkpoint_bytes

_COPIES = 2  # one is whole while the other is written
_SHARE = 0.25  # of the free memory, which nobody has asked for


def copies_bytes(config: Config, nodes: int = 1) -> int:
    """Host memory on each of so many machines: of the copies of its processes, and of those of the machine before."""
    whole = _COPIES * checkpoint_bytes(config)
    return whole if nodes == 1 else 2 * whole // nodes


def keeps_copies(config: Config, *, on_gpu: bool, nodes: int) -> bool:
    """Whether a run on so many machines keeps copies, if its memory allows."""
    asked = config.checkpoint.in_memory
    return asked is True or (asked == "auto" and nodes == 1 and not on_gpu)


def free_bytes(system: Path = Path("/")) -> int:
    """Memory that processes of this machine, or of its container, may still take. system: the root of /proc."""
    lines = (system / "proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit = memory_limit(system)
    return free if limit is None else min(free, max(0, limit.limit - limit.used))


def too_much(config: Config, free: int, nodes: int = 1) -> str | None:
    """Why the copies do not fit into so much free memory of a machine, in words; None if they do."""
    needed, share = copies_bytes(config, nodes), 1.0 if config.checkpoint.in_memory is True else _SHARE
    if needed <= share * free:
        return None
    allowed = "" if share == 1 else f", of which checkpoint.in_memory = auto takes {share:.0%} at most"
    what = (
        "two copies of the state" if nodes == 1 else "two copies of the state of this node, and of the one before it,"
    )
    return f"{what} take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free{allowed}"
