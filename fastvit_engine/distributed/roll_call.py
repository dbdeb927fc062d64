"""Ranks report to each other before they join; one that ends because of bad input says so, and the others end with it.

Joining itself tells nobody who is missing, and takes as long as a collective operation may. A rank may end before it
joins although the others do not: its host lacks a file, a GPU or a route.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from fastvit_engine.distributed.store import JobStore, is_loopback
from fastvit_engine.errors import RestartError, UserError

_POLL_SECONDS = (0.01, 0.2)  # at first, at most
_TELL_SECONDS = 60.0  # for the others to start, and hear of a rank that ended


class PeerEnded(UserError):
    """Another rank has ended because of bad input."""


def call_roll(patience: float, environment: Mapping[str, str] = os.environ) -> dist.Store | None:
    """Returns when all ranks of the job have reported: the store, to be kept until the process has joined.

    Raises PeerEnded with the sentence of a rank that has ended because of bad input, RestartError if ranks have not
    reported after `patience` seconds, and torch.distributed.DistError if rank 0 is gone.
    """
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if world == 1:
        return None
    store = _open_store(environment, patience)
    _wait_for_all(store, rank, world, patience)
    return store


def tell_that_this_rank_ends(message: str, environment: Mapping[str, str] = os.environ) -> None:
    """Tells the ranks that are starting that this one ends because of bad input, and why.

    Takes until rank 0 can be reached, for at most a minute. As rank 0 itself, until all others have heard. Does nothing
    if there is nobody to tell, or no way to.
    """
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    deadline = time.monotonic() + _TELL_SECONDS
    if world == 1 or not (_serves(environment) or _reachable(environment, deadline)):
        return
    try:
        store = _open_store(environment, _TELL_SECONDS)
        store.compare_set("ended", "", json.dumps([rank, socket.gethostname(), message]))
        _leave(store, rank, world, deadline)
    except (RuntimeError, OSError):  # rank 0 is gone: nobody can hear it any more
        return


def _wait_for_all(store: dist.Store, rank: int, world: int, patience: float) -> None:
    deadline, (pause, longest) = time.monotonic() + patience, _POLL_SECONDS
    store.set(f"here/{rank}", "")
    keys = [f"here/{other}" for other in range(world)] if rank == 0 else ["all"]
    while not store.check(keys):
        if store.check(["ended"]):
            other, host, message = json.loads(store.get("ended"))
            _leave(store, rank, world, time.monotonic() + _TELL_SECONDS)
            raise PeerEnded(f"rank {other} on {host} has ended: {message}")
        if time.monotonic() > deadline:
            missing = [str(other) for other in range(world) if not store.check([f"here/{other}"])]
            raise RestartError(
                f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing)} of {world} did not start within "
                f"{patience:.0f} s: see what they and their hosts say"
            )
        time.sleep(pause)
        pause = min(2 * pause, longest)
    if rank == 0:
        store.set("all", "")


def _leave(store: dist.Store, rank: int, world: int, deadline: float) -> None:
    """Returns at once; as rank 0, which may hold the store, when all others have heard, or at `deadline`."""
    store.set(f"heard/{rank}", "")
    others = [f"heard/{other}" for other in range(1, world)]
    while rank == 0 and not store.check(others) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS[1])


def _open_store(environment: Mapping[str, str], patience: float) -> dist.Store:
    """The store that the processes will join through, which is new for every attempt to start them."""
    address = environment["MASTER_ADDR"]
    store = JobStore(
        address,
        int(environment["MASTER_PORT"]),
        int(environment["WORLD_SIZE"]),
        _serves(environment),
        timeout=timedelta(seconds=patience),
        wait_for_workers=False,
        multi_tenant=not is_loopback(address),  # joining makes the same store again
    )
    # Without TORCHELASTIC_RESTART_COUNT: each agent counts the failures of its own processes only.
    return dist.PrefixStore("roll call", store)


def _serves(environment: Mapping[str, str]) -> bool:
    """Whether this process holds the store."""
    return environment["RANK"] == "0" and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _reachable(environment: Mapping[str, str], deadline: float) -> bool:
    """Waits until the store can be reached; False if it cannot before `deadline`, or there is no such address."""
    while True:
        try:
            address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
            socket.create_connection(address, timeout=5).close()
            return True
        except (socket.gaierror, UnicodeError, OverflowError, ValueError):
            return False
        except OSError:
            if time.monotonic() > deadline:
                return False
        time.sleep(_POLL_SECONDS[1])
