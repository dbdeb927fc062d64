"""Ranks of a run that start in no time: each is forked from a process that has imported PyTorch and DeepSpeed already.

A rank does what it does under torchrun: it finds its place in the environment, and calls `fastvit train`.
"""

import multiprocessing.connection
import os
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch.distributed as dist

from fastvit_engine.distributed.supervise import rank_environment
from tests.fastvit_engine.warm_rank import run_rank

# the last is imported by PyTorch when a training begins, which takes longer than all the rest
_IMPORTED = [
    "deepspeed",
    "fastvit_engine.train.loop",
    "fastvit_engine.distributed.launch",
    "torch._dynamo",
]
_SEEN = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1"}
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(_IMPORTED)


def run_ranks(
    arguments: Sequence[str],
    processes: int,
    log: Path,
    environment_of: Callable[[int], Mapping[str, str]] = lambda rank: {},
    seconds: float = 300,
) -> bool:
    """Runs `fastvit ARGUMENTS` once a rank, to the end; whether all ended well. See `exit_codes_of`."""
    return not any(exit_codes_of(arguments, processes, log, environment_of, seconds))


def exit_codes_of(
    arguments: Sequence[str],
    processes: int,
    log: Path,
    environment_of: Callable[[int], Mapping[str, str]] = lambda rank: {},
    seconds: float = 300,
    before: Callable[[], None] | None = None,
) -> list[int | None]:
    """Runs `fastvit ARGUMENTS` once a rank, to the end; returns the exit codes. `log` takes what they print.

    environment_of: what a rank has in its environment besides. before: a function that a rank calls first.
    """
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    ranks: list[ForkServerProcess] = []
    with pytest.MonkeyPatch.context() as patch:  # what is imported first may look at these
        for name, value in _SEEN.items():
            patch.setenv(name, value)
        for rank in range(processes):
            environment = {**os.environ, **rank_environment(rank, processes, store.port)}
            environment |= {"LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            environment |= environment_of(rank)
            ranks.append(_forks.Process(target=run_rank, args=(list(arguments), environment, log, before)))
            ranks[-1].start()
    deadline = time.monotonic() + seconds
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        if time.monotonic() > deadline:
            break
        multiprocessing.connection.wait([rank.sentinel for rank in ranks if rank.is_alive()], timeout=1)
    for rank in ranks:
        rank.join(10)  # once one has failed, the others say what they saw
        rank.kill()
        rank.join()
    return [rank.exitcode for rank in ranks]
