"""Whether the launcher keeps copies of the newest state in memory, and what it needs to restart ranks from them."""

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from fastvit_engine.checkpoint.in_memory import HeldCopies, can_hold, held_copies
from fastvit_engine.checkpoint.owner import LAUNCHER
from fastvit_engine.config import Config
from fastvit_engine.distributed.fast_restart import FastRestart
from fastvit_engine.errors import UserError
from fastvit_engine.shown import say
from fastvit_engine.sizing.copies import free_bytes, too_much

_PRELOADED = ("fastvit_engine.train.preloaded",)


@dataclass(frozen=True)
class Restarts:
    """How a launcher starts ranks, and what it knows of their progress beside checkpoints."""

    environment: Mapping[str, str]  # of the ranks
    fast: FastRestart | None = None  # None: each with an interpreter of its own, and no copies
    newest_step: Callable[[], int | None] = lambda: None  # of the copies


@contextmanager
def restarts(
    config: Config, processes: int, max_restarts: int, environment: Mapping[str, str], *, on_gpu: bool
) -> Iterator[Restarts]:
    """What `checkpoint.in_memory` asks for, as long as the block lasts. UserError if it insists and cannot be."""
    why_not = _why_not(config, max_restarts, on_gpu=on_gpu)
    if why_not is None:
        with held_copies(processes) as holder:
            variables = {**environment, **holder.environment, LAUNCHER: str(os.getpid())}
            descriptors = [area.descriptor for area in holder.areas]
            fast = FastRestart(_PRELOADED, descriptors, holder.forget, processes, variables)
            try:
                yield Restarts(variables, fast, lambda: holder.newest_step)
            finally:
                fast.close()
        return
    if config.checkpoint.in_memory is True:
        raise UserError(f"checkpoint.in_memory = true, and {why_not}: set checkpoint.in_memory=false")
    if config.checkpoint.in_memory == "auto" and why_not.startswith("two copies"):
        say(f"no copies in memory: {why_not}")
    yield Restarts(environment)


def check_room(config: Config, held: HeldCopies) -> None:
    """Raises UserError on all ranks if a node has no room for the copies of its own ranks and of the node before it.

    Collective. With checkpoint.in_memory = auto, `fastvit train` has seen to it.
    """
    if held.own is None or config.checkpoint.in_memory is not True:
        return
    world = held.world
    nodes = world.size // len(world.node_ranks)
    problem = too_much(config, free_bytes() + held.taken_bytes, nodes)
    problems = [f"on {host}, {text}" for host, text in world.gather((socket.gethostname(), problem)) if text]
    if problems:
        raise UserError(f"checkpoint.in_memory = true, and {problems[0]}: set checkpoint.in_memory=false")


def _why_not(config: Config, max_restarts: int, *, on_gpu: bool) -> str | None:
    """Why there are no copies, in words; None if there are."""
    asked = config.checkpoint.in_memory
    if asked is False:
        return "it is off"
    if not can_hold():
        return "only Linux has memory that outlives a process without a name"
    if max_restarts == 0:
        return "--max-restarts 0 never restarts from a copy"
    if asked == "auto" and on_gpu:
        return "auto is for CPUs"
    return too_much(config, free_bytes())
