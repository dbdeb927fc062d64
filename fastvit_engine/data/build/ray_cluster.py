"""An executor on a Ray cluster: connects, checks every node before work, and runs tasks there.

Nodes need the package installed, in the version of this machine: no code is sent, but for references to functions.
Workers read the source and write shards themselves, so that the object store holds only functions and small results.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

# Read when Ray is imported or starts: no reports of usage, and no advice about GPUs, which these tasks do not use.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fastvit_engine.data.build.parallel import Counter
from fastvit_engine.data.build.ray_worker import (
    Admission,
    Outcome,
    Progress,
    TaskCounter,
    Token,
    Work,
    check_node,
    end_processes,
    fetch,
    identity,
    run_task,
    seen,
)
from fastvit_engine.errors import UserError
from fastvit_engine.observe.units import counted

_POLL_SECONDS = 0.2
_RETRIES = 3  # of a task whose worker or node died
_LOOK_SECONDS = 5.0  # between looks at the nodes
_EMPTY_SECONDS = 60.0  # that the cluster may be without a CPU
_ANSWER_SECONDS = 10.0  # for a connection to the cluster
_CHECK_SECONDS = 120.0  # for a process to start on a node and to check it
_END_SECONDS = 10.0  # for the processes of tasks to end


@contextlib.contextmanager
def ray_cluster(address: str | None, tasks: int | None, say: Callable[[str], None]) -> Iterator["RayCluster"]:
    """Connects as `ray.init(address)` does and says to which cluster; disconnects at the end.

    A local Ray that this starts ends with it, and one that the process has already connected to stays. `tasks`: how
    many run at once (default: one per CPU of the cluster). Raises UserError if there is no such cluster.
    """
    with contextlib.nullcontext() if ray.is_initialized() else connected(address):
        cluster = RayCluster(tasks)
        try:
            say(cluster.describe())
            yield cluster
        finally:
            cluster.close()


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connects this process to Ray, without Ray's words on the terminal. Raises UserError."""
    _check_answers(address or os.environ.get("RAY_ADDRESS") or "")
    # Ray prints its events, such as the death of a worker, to stdout, and has no setting for it. What matters of them
    # is in the sentences of this file, and the rest in Ray's own logs.
    worker: Any = ray._private.worker
    printing = getattr(worker, "print_to_stdstream", None)
    worker.print_to_stdstream = lambda *_, **__: None
    on_terminate = signal.getsignal(signal.SIGTERM)  # which Ray replaces
    try:
        ray.init(address, logging_level=logging.CRITICAL, log_to_driver=False, include_dashboard=False)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate if callable(on_terminate) else _leave)
        yield
    except (RayError, OSError, RuntimeError, ValueError) as error:
        if ray.is_initialized():  # it is of the work
            raise
        reason = str(error).strip().partition("\n")[0].rstrip(".: ")
        raise UserError(_unreachable(address or os.environ.get("RAY_ADDRESS") or "on this machine", reason)) from error
    finally:
        ray.shutdown()
        worker.print_to_stdstream = printing
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)


def _check_answers(address: str) -> None:
    """Raises UserError if nothing listens at HOST:PORT; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise UserError(_unreachable(address, reason)) from error


def _unreachable(where: str, reason: str) -> str:
    return (
        f"the Ray cluster {where} cannot be reached ({reason}): run the command on one of its nodes, or start one with "
        "`ray start --head`"
    )


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)  # so that a local Ray is stopped, too


class RayCluster:
    """An `Executor` on the cluster that this process is connected to."""

    def __init__(self, tasks: int | None) -> None:
        self._tasks = tasks
        self._token: Path | None = None
        self._admission = ray.put(Admission(identity(), _umask(), os.getcwd(), [], None))
        self._counters: dict[str, tuple[Counter, int]] = {}  # those of the current map, with their value before it
        self._run = ray.remote(num_cpus=1, max_retries=_RETRIES, scheduling_strategy="SPREAD")(run_task)
        self._check = ray.remote(num_cpus=0, max_retries=_RETRIES)(check_node)
        self._end = ray.remote(num_cpus=0, max_retries=0)(end_processes)
        here = _on(ray.get_runtime_context().get_node_id())
        self._progress: Any = ray.remote(num_cpus=0)(Progress).options(scheduling_strategy=here).remote()

    def close(self) -> None:
        with contextlib.suppress(RayError):
            ray.kill(self._progress)
        self._remove_token()

    def describe(self) -> str:
        """Which cluster it is, in one line. Raises UserError if it has no CPU."""
        nodes = _nodes()
        if not nodes:
            raise UserError("the Ray cluster has no node with a CPU: add one with `ray start --address HOST:PORT`")
        address = ray.get_runtime_context().gcs_address
        return f"Ray cluster {address}: {counted(len(nodes), 'node')}, {counted(_cpus(nodes), 'CPU')}"

    def check(self, reads: Sequence[str], writes: Path | None = None) -> None:
        """Runs the check of a node on each of them. Later tasks and nodes must pass the same."""
        token = None
        if writes is not None:
            self._remove_token()
            self._token = writes / f".nodes-{uuid.uuid4().hex}"
            token = Token(str(self._token), self._token.name)
            try:
                self._token.write_text(token.content)
            except OSError as error:
                raise UserError(f"cannot write to {writes} ({error.strerror}): choose another --out") from error
        expected = []
        for path in reads:
            with contextlib.suppress(OSError, UserError):  # what this machine cannot read is for its reader to explain
                expected.append((path, seen(path)))
        self._admission = ray.put(Admission(identity(), _umask(), os.getcwd(), expected, token))
        checks = {
            node["NodeID"]: self._check.options(scheduling_strategy=_on(node["NodeID"])).remote([self._admission])
            for node in _nodes()
        }
        deadline = time.monotonic() + _CHECK_SECONDS
        for node, check in checks.items():
            name = next((f"{n['NodeManagerHostname']} ({node[:8]})" for n in ray.nodes() if n["NodeID"] == node), node)
            try:
                problem = ray.get(check, timeout=max(1.0, deadline - time.monotonic()))
            except RayTaskError as error:  # before the task's own code
                raise UserError(_cannot_load(f"node {name}", error)) from error
            except RayError as error:
                reason = str(error).strip().partition("\n")[0].rstrip(".")
                raise UserError(
                    f"node {name} of the Ray cluster does not answer ({reason}): take it out of the cluster, or run "
                    "the same command again"
                ) from error
            if problem is not None:
                raise UserError(problem)

    def map(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], while_waiting: Callable[[], None]
    ) -> Generator[tuple[Any, Any], None, None]:
        """See `Executor`. A few tasks per CPU are submitted at a time, and their results fetched at once."""
        name = uuid.uuid4().hex
        self._counters = {}
        pending: dict[ray.ObjectRef, int] = {}
        waiting = iter(range(len(tasks)))
        try:
            ray.get(self._progress.start.remote(name))
            work = Work(name, self._admission, self._put(function), self._progress)
            limit = _Limit(self._tasks)
            while True:
                for number in islice(waiting, max(0, limit.current() - len(pending))):
                    pending[self._run.remote(work, number, tasks[number])] = number
                if not pending:
                    break
                done, _ = ray.wait(list(pending), timeout=_POLL_SECONDS)
                for reference in done:
                    number = pending.pop(reference)
                    yield tasks[number], _result(ray.get(reference))
                self._update_counters()
                while_waiting()
            self._update_counters()
        except RayTaskError as error:  # before the task's own code, on a node that has joined since the check
            raise UserError(_cannot_load("a node", error)) from error
        except RayError as error:
            raise UserError(_about_loss(error)) from error
        finally:
            self._end_tasks(pending)

    def _remove_token(self) -> None:
        if self._token is not None:
            with contextlib.suppress(OSError):
                self._token.unlink()

    def _put(self, function: Callable[[Any], Any]) -> ray.ObjectRef:
        """Puts a function into the object store, its counters as those of tasks."""
        ray.util.register_serializer(Counter, serializer=self._register, deserializer=TaskCounter)
        try:
            return ray.put(function)
        finally:
            ray.util.deregister_serializer(Counter)

    def _register(self, counter: Counter) -> tuple[str, int]:
        """How a counter is pickled: by a name, under which tasks report."""
        for key, (known, before) in self._counters.items():
            if known is counter:
                return key, before
        key = str(len(self._counters))
        self._counters[key] = counter, counter.value
        return key, counter.value

    def _end_tasks(self, pending: dict[ray.ObjectRef, int]) -> None:
        """Ends the tasks of the map by force, and waits until their processes have ended: none writes after that.

        Not with ray.cancel: Ray 2.60 ends this process if it is told to cancel a task whose result is just arriving.
        Ray starts tasks again whose process was killed; they find that their map has ended, and return.
        """
        if not pending or not ray.is_initialized():
            return
        with contextlib.suppress(RayError):
            processes: dict[str, list[int]] = fetch(self._progress.stop.remote(list(pending.values())))
            ends = [
                self._end.options(scheduling_strategy=_on(node)).remote(processes[node], _END_SECONDS)
                for node in (node["NodeID"] for node in _nodes())
                if node in processes
            ]
            ray.get(ends, timeout=2 * _END_SECONDS)

    def _update_counters(self) -> None:
        if self._counters:
            totals: dict[str, int] = fetch(self._progress.totals.remote())
            for key, (counter, before) in self._counters.items():
                counter.set(before + totals.get(key, 0))


class _Limit:
    """How many tasks may be submitted: those that run, and as many that wait; nodes may come and go."""

    def __init__(self, tasks: int | None) -> None:
        self._tasks = tasks
        self._limit = 0
        self._looked_at = -_LOOK_SECONDS
        self._empty_since: float | None = None

    def current(self) -> int:
        """Raises UserError if the cluster has had no CPU for a minute."""
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            cpus = _cpus(_nodes())
            self._limit = self._tasks or 2 * cpus
            if cpus:
                self._empty_since = None
            elif self._empty_since is None:
                self._empty_since = now
            elif now - self._empty_since > _EMPTY_SECONDS:
                raise UserError(
                    "the Ray cluster has no node with a CPU left: add one and run the same command again, which "
                    "continues"
                )
        return self._limit


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _cpus(nodes: list[dict[str, Any]]) -> int:
    return sum(int(node["Resources"]["CPU"]) for node in nodes)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _result(outcome: Outcome) -> Any:
    if outcome.user_error is not None:
        raise UserError(outcome.user_error)
    if outcome.lost is not None:
        raise UserError(f"the Ray cluster lost what its tasks need ({outcome.lost}): run the same command again")
    if outcome.crash is not None:
        raise RuntimeError(f"a task on the Ray cluster failed:\n{outcome.crash}")
    return outcome.result


def _cannot_load(node: str, error: RayTaskError) -> str:
    reason = str(error).strip().rpartition("\n")[2]
    return (
        f"{node} of the Ray cluster cannot load fastvit_engine ({reason}): install the version of this machine on "
        "every node"
    )


def _about_loss(error: RayError) -> str:
    reason = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
    return (
        f"a task on the Ray cluster was lost {_RETRIES + 1} times, perhaps for lack of memory ({reason}): run the same "
        "command again, with fewer --workers"
    )
