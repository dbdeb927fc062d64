"""Ranks report to each other before they join; one that ends because of bad input says so, and the others end with it.

Of all ranks that end, one says why.

Joining itself tells nobody who is missing, and takes as long as a collective operation may. A rank may end before it
joins although the others do not: its host lacks a file, a GPU or a route.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from threading import Thread

import torch.distributed as dist

from fastvit_engine.distributed.store import JobStore, is_loopback
from fastvit_engine.errors import EXIT_BAD_INPUT, Preempted, RestartError, Sentence, UserError

_POLL_SECONDS = (0.01, 0.2)  # at first, at most
_TELL_SECONDS = 180.0  # for the others to start, and hear of a rank that ended: hosts may be busy, and disks shared
_SPEAK_SECONDS = 30.0  # a rank that has not been able to ask the others, or not heard one speak, speaks itself
_GATHER_SECONDS = 10.0  # for ranks that start to say that they end, or that they are here
_GATHER_JOINED_SECONDS = 2.0  # for ranks that have joined, and so are at the same point, to say that they end too
_SHOWN = 8  # ranks and hosts that a sentence names


class PeerEnded(UserError):
    """Another rank has ended because of bad input."""

    def __init__(self, message: str, store: dist.Store) -> None:
        super().__init__(message)
        self.store = store  # that of the roll call: rank 0, which may hold it, cannot open it twice


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


def end_with_others(error: Sentence, speak: Callable[[str], None], environment: Mapping[str, str] = os.environ) -> int:
    """Ends this rank because of `error`: one rank of the job says why, with `speak`. Returns the exit code of this one.

    Bad input that ranks meet by themselves is gathered: all of it is one sentence, with rank and host unless all ranks
    say the same. A rank that cannot ask the others speaks for itself. Takes three minutes at most, as rank 0 that holds
    the store, or if nobody answers.
    """
    if int(environment["WORLD_SIZE"]) == 1:
        speak(str(error))
    elif isinstance(error, Preempted):  # all have saved, at the same step
        if environment["RANK"] == "0":
            speak(str(error))
    elif isinstance(error, RestartError) and not error.of_all and not _bad_input_elsewhere():
        speak(str(error))
    else:
        _end(error, speak, environment)
        return EXIT_BAD_INPUT if _is_peers(error) else error.exit_code
    return error.exit_code


def tell_that_this_rank_ends(message: str, environment: Mapping[str, str] = os.environ) -> None:
    """Tells the ranks that are starting that this one ends because of bad input, and why, and says nothing itself.

    Takes until rank 0 can be reached, for at most three minutes. As rank 0 itself, until all others know. Does nothing
    if there is nobody to tell, or no way to.
    """
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    deadline = time.monotonic() + _TELL_SECONDS
    if world == 1 or not (_serves(environment) or _reachable(environment, deadline)):
        return
    try:
        store = _open_store(environment, _TELL_SECONDS)
        store.compare_set("ended", "", json.dumps([rank, socket.gethostname(), message]))
        _leave(store, "knows", rank, world, deadline)
    except (RuntimeError, OSError):  # rank 0 is gone: nobody can hear it any more
        return


def _end(error: Sentence, speak: Callable[[str], None], environment: Mapping[str, str]) -> None:
    spoken: list[str] = []

    def once(text: str) -> None:
        if not spoken:
            spoken.append(text)
            speak(text)

    def ask() -> None:
        try:
            _agree(error, once, environment)
        except (RuntimeError, OSError):  # the store is gone, and rank 0 or its launcher with it
            once(_alone(error, environment))

    thread = Thread(target=ask, name="end", daemon=True)  # no answer of the store is waited for without a limit
    thread.start()
    thread.join(_TELL_SECONDS + _GATHER_SECONDS)
    if thread.is_alive() and not _is_peers(error):
        once(_alone(error, environment))


def _agree(error: Sentence, speak: Callable[[str], None], environment: Mapping[str, str]) -> None:
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    deadline, joined = time.monotonic() + _TELL_SECONDS, dist.is_initialized()
    if joined:
        store = _joined_store()
    elif isinstance(error, PeerEnded):
        store = error.store
    else:
        soon = min(deadline, time.monotonic() + _SPEAK_SECONDS)
        if not (_serves(environment) or _reachable(environment, soon)):
            speak(_alone(error, environment))
            if not _reachable(environment, deadline):
                return
        store = _open_store(environment, _TELL_SECONDS)
    if not _is_peers(error):
        own = json.dumps([rank, socket.gethostname(), str(error)])
        store.set(f"ended/{rank}", own)
        store.set(f"knows/{rank}", "")
        store.compare_set("ended", "", own)
        if store.compare_set("speaker", "", str(rank)).decode() == str(rank):
            gathers = _GATHER_JOINED_SECONDS if joined else _GATHER_SECONDS
            speak(str(error) if error.of_all else _gathered(store, world, gathers))
            store.set("told", "")
            return _leave(
                store, "heard", rank, world, time.monotonic() + _GATHER_JOINED_SECONDS if joined else deadline
            )
    speaks = time.monotonic() + _SPEAK_SECONDS
    while not store.check(["told"]):
        if time.monotonic() > speaks:
            speak(_alone(error, environment))
            break
        time.sleep(_POLL_SECONDS[1])
    _leave(store, "heard", rank, world, time.monotonic() + _GATHER_JOINED_SECONDS if joined else deadline)


def _is_peers(error: Sentence) -> bool:
    """Whether the bad input is another rank's, which this one only heard of."""
    return isinstance(error, PeerEnded | RestartError) and not error.of_all


def _gathered(store: dist.Store, world: int, seconds: float) -> str:
    """What the ranks say that end, when all have said that they end or wait for others; or after some seconds."""
    deadline, unknown = time.monotonic() + seconds, set(range(world))
    ended: dict[int, tuple[str, str]] = {}
    while unknown and time.monotonic() < deadline:
        for rank in sorted(unknown):
            if store.check([f"ended/{rank}"]):
                _, host, message = json.loads(store.get(f"ended/{rank}"))
                ended[rank] = host, message
                unknown.discard(rank)
            elif store.check([f"here/{rank}"]):
                unknown.discard(rank)
        time.sleep(_POLL_SECONDS[0])
    said: dict[str, list[int]] = {}
    for rank, (_, message) in sorted(ended.items()):
        said.setdefault(message, []).append(rank)
    if len(ended) == world and len(said) == 1:
        return next(iter(said))
    parts = []
    for message, ranks in said.items():
        hosts = sorted({ended[rank][0] for rank in ranks})
        parts.append(f"{_few('rank', ranks)} on {_few('', hosts)}: {message}")
    return "; ".join(parts)


def _alone(error: Sentence, environment: Mapping[str, str]) -> str:
    """What a rank says of its own end if it cannot ask what the others say."""
    if error.of_all or _is_peers(error):
        return str(error)
    return f"rank {environment['RANK']} on {socket.gethostname()}: {error}"


def _few(noun: str, items: Sequence[object]) -> str:
    """As many as fit in a sentence: "rank 3", "ranks 0, 1 and 7 more"."""
    shown = ", ".join(str(item) for item in items[:_SHOWN])
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{noun}{'s' if noun and len(items) > 1 else ''} {shown}{more}".strip()


def _joined_store() -> dist.Store:
    """A connection of its own to the store of the processes that have joined."""
    store = dist.PrefixStore("roll call", dist.distributed_c10d._get_default_store()).clone()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=_SPEAK_SECONDS))
    return store


def _bad_input_elsewhere() -> bool:
    """Whether another rank, which this one misses now, has ended because of bad input."""
    found: list[bool] = []

    def look() -> None:
        with contextlib.suppress(RuntimeError, OSError):
            found.append(_joined_store().check(["ended"]))

    if not dist.is_initialized():
        return False
    thread = Thread(target=look, name="end", daemon=True)
    thread.start()
    thread.join(_GATHER_JOINED_SECONDS)
    return found == [True]


def _wait_for_all(store: dist.Store, rank: int, world: int, patience: float) -> None:
    deadline, (pause, longest) = time.monotonic() + patience, _POLL_SECONDS
    store.set(f"here/{rank}", "")
    keys = [f"here/{other}" for other in range(world)] if rank == 0 else ["all"]
    while not store.check(keys):
        if store.check(["ended"]):
            other, host, message = json.loads(store.get("ended"))
            _leave(store, "knows", rank, world, time.monotonic() + _TELL_SECONDS)
            raise PeerEnded(f"rank {other} on {host} has ended: {message}", store)
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


def _leave(store: dist.Store, key: str, rank: int, world: int, deadline: float) -> None:
    """Returns at once; as rank 0, which may hold the store, when all others have set `key` too, or at `deadline`."""
    store.set(f"{key}/{rank}", "")
    others = [f"{key}/{other}" for other in range(1, world)]
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
