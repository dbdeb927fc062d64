"""Hangs and lost processes: noticed in bounded time, explained in one sentence, ended so that a launcher can restart.

Besides training, each rank has a thread that sends its status to the others once per second, and reads theirs, through
the job's key-value store. If no rank has made progress for too long, all write the stack traces of their threads, the
lowest rank that is alive says which ranks are missing or late, and all exit with code 75: a process cannot be called
back from a collective operation whose peer is gone. A second thread watches the first, because the store may stop
answering too. Each rank uses its own monotonic clock, so clocks need not agree.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from threading import Event, Thread
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from fastvit_engine.config import WatchdogConfig
from fastvit_engine.distributed.environment import speaks_for_all
from fastvit_engine.distributed.hang import RankStatus, describe_hang, describe_loss
from fastvit_engine.distributed.stacks import new_request, requested, write_stacks
from fastvit_engine.distributed.supervise import SAME_REQUEST_SECONDS
from fastvit_engine.distributed.world import World, collective_failure
from fastvit_engine.errors import EXIT_RESTART, Preempted, RestartError
from fastvit_engine.observe.events import record_event
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.shown import say

T = TypeVar("T")

_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 3.0  # without a heartbeat: the rank is missing
_READS_PER_SECOND = 50  # of heartbeats, by each rank, so that a thousand ranks do not overwhelm the store
_TOGETHER_SECONDS = 5.0  # that ranks wait for each other before they leave; a launcher should give them twice that
_SUSPENDED_SECONDS = 10.0  # between two iterations of a thread: this process was stopped, and no rank is at fault
_STORE_GONE_SECONDS = 30.0  # without progress, once the store is gone


class Watchdog:
    """Watches this rank, and the others through it, while it is entered (collective).

    Training reports what it does with `phase` and `step_done`, which only set attributes. An error that leaves the
    block is passed on to the other ranks; that of a collective operation becomes a RestartError that names the lost
    rank.
    """

    def __init__(self, run: RunFolder, world: World, config: WatchdogConfig) -> None:
        self.run, self.world, self.config = run, world, config
        self.on_phase: Callable[[str], None] | None = None  # called when a phase begins
        self.on_start_phase: Callable[[str], None] = lambda name: None  # likewise, to show what a start does
        self.on_step: Callable[[], None] = lambda: None
        self._status = RankStatus(world.rank, socket.gethostname())
        self._statuses = [self._status]  # of all ranks, as last heard
        self._first_step: int | None = None
        now = time.monotonic()
        self._phase_began = self._progress_seen = self._store_answered = now
        self._heard: list[float] = []  # when the heartbeat of each rank last changed
        self._beats = 0
        self._beats_read = now
        self._store_error: str | None = None
        self._stacks_wanted = False
        self._stacks_written = ("", -SAME_REQUEST_SECONDS)  # the last request, and when
        self._leaving_since: float | None = None
        self._failed_at: float | None = None
        self._own_failure: str | None = None  # what this rank has to say itself
        self._collective_failure = ""
        self._failure: str | None = None  # what all ranks say
        self._failure_known, self._stop, self._wake = Event(), Event(), Event()

    # ---- what training reports

    def phase(self, name: str, *, slow: bool = False) -> None:
        """Begins another phase, which is progress. `slow`: it may take `slow_phase_seconds`."""
        before = self._status
        starting = before.step == self._first_step  # data workers start, kernels are compiled
        self._status = replace(before, phase=name, marks=before.marks + 1, slow=slow or starting)
        self._phase_began = time.monotonic()
        self.on_start_phase(name)
        if self.on_phase is not None:
            self.on_phase(name)

    def step_done(self, step: int) -> None:
        """Reports that `step` optimizer steps are done."""
        self._status = replace(self._status, step=step, marks=0, slow=False)
        self.on_step()

    def begin(self, step: int) -> None:
        """Reports that training begins, after `step` optimizer steps of earlier jobs."""
        self._first_step = step
        self._status = replace(self._status, step=step)

    def marked(self, items: Iterable[T], phase: str) -> Iterator[T]:
        """Yields the items; each is progress in `phase`."""
        for item in items:
            self.phase(phase)
            yield item

    # ---- requests from others

    @property
    def hosts(self) -> list[str]:
        """The host of each rank."""
        return [status.host for status in self._statuses]

    @property
    def last_heard(self) -> list[tuple[RankStatus, float]]:
        """Of each rank its last status, and the seconds since it sent one."""
        now = time.monotonic()
        return [(status, now - heard) for status, heard in zip(self._statuses, self._heard, strict=False)]

    def request_stacks(self) -> None:
        """Asks every rank for its stack traces; may be called from any thread."""
        self._stacks_wanted = True
        self._wake.set()

    # ---- beginning and end

    def __enter__(self) -> "Watchdog":
        # A separate connection: an operation that waits for a key blocks the connection it waits on.
        store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store())
        self._store = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=self.config.slow_phase_seconds))
        if self.world.is_main:
            self._store.multi_set(["stacks", "hang", "hang_written", "hang_told", "failure"], ["", "", "0", "", ""])
        self._stacks_written = (requested(self.run), -SAME_REQUEST_SECONDS)
        self._send_heartbeat()
        self.world.barrier()  # from here on every key exists, so no reader has to wait for one
        self._statuses = self._read_statuses()
        now = time.monotonic()
        self._heard = [now] * self.world.size
        self._progress_seen = self._store_answered = now
        Thread(target=self._exchange_until_stopped, name="watchdog", daemon=True).start()
        Thread(target=self._watch_store, name="store watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception) and not isinstance(error, Preempted):
                cause = collective_failure(error)
                message = self._agree_on_failure(error, cause)
                if cause:
                    raise RestartError(message) from error
        finally:
            self._stop.set()
            self._wake.set()

    def _agree_on_failure(self, error: Exception, collective: str | None) -> str:
        if collective is None:
            self._own_failure = f"{self._status} has failed: {_one_line(error)}"
        self._collective_failure = collective or ""
        self._failed_at = time.monotonic()
        self._wake.set()
        self._failure_known.wait(_SILENT_SECONDS + _TOGETHER_SECONDS)
        if self._failure is None:
            state = "is gone, so rank 0 or its launcher has ended" if self._store_error else "is silent"
            self._failure = self._own_failure or f"the job's store {state}; a collective operation failed: {collective}"
            if self._status.step is not None:
                self._record("failure", self._failure, [])
        return self._failure

    # ---- the heartbeat thread, the only one that uses the store

    def _exchange_until_stopped(self) -> None:
        turn = time.monotonic()
        while not self._stop.is_set():
            try:
                self._exchange()
            except RuntimeError as error:  # the store is gone: the other thread decides what to do
                self._store_error = collective_failure(error) or _one_line(error)
                self._failure_known.set()  # nothing more will be known
                return
            self._wake.wait(_BEAT_SECONDS)
            self._wake.clear()
            turn = self._restart_clocks_if_suspended(turn)

    def _exchange(self) -> None:
        self._send_heartbeat()
        if self._failed_at or time.monotonic() - self._beats_read >= self.world.size / _READS_PER_SECOND:
            self._read_heartbeats()
        self._answer_stack_requests()
        now = time.monotonic()
        hang = self._store.get("hang").decode()
        if not hang and not self._failed_at and now - self._progress_seen > self._bound(self._living()):
            hang = self._store.compare_set("hang", "", self._hang_report(now)).decode()
        if hang:
            self._leave_together(**json.loads(hang))
        if self._failed_at and self._failure is None:
            self._settle_failure(now)
        self._store_answered = now

    def _send_heartbeat(self) -> None:
        self._beats += 1
        status = replace(self._status, seconds=time.monotonic() - self._phase_began, beat=self._beats)
        self._store.set(f"beat/{self.world.rank}", json.dumps(vars(status)))

    def _read_heartbeats(self) -> None:
        statuses = self._read_statuses()
        self._beats_read = now = time.monotonic()
        for rank, (before, status) in enumerate(zip(self._statuses, statuses, strict=True)):
            if status.beat != before.beat:
                self._heard[rank] = now
            if status.position != before.position:
                self._progress_seen = now
        self._statuses = statuses

    def _read_statuses(self) -> list[RankStatus]:
        beats = self._store.multi_get([f"beat/{rank}" for rank in range(self.world.size)])
        return [RankStatus(**json.loads(beat)) for beat in beats]

    def _silent(self) -> dict[int, float]:
        """Ranks without a recent heartbeat, and the seconds since the last."""
        limit = _SILENT_SECONDS + self.world.size / _READS_PER_SECOND
        silence = {rank: self._beats_read - heard for rank, heard in enumerate(self._heard)}
        return {rank: seconds for rank, seconds in silence.items() if seconds > limit}

    def _living(self) -> list[RankStatus]:
        silent = self._silent()
        return [status for status in self._statuses if status.rank not in silent]

    def _bound(self, statuses: list[RankStatus]) -> float:
        slow = any(status.slow for status in statuses)
        return self.config.slow_phase_seconds if slow else self.config.timeout_seconds

    # ---- stack traces

    def _answer_stack_requests(self) -> None:
        request, now = self._store.get("stacks").decode(), time.monotonic()
        last, written_at = self._stacks_written
        from_folder = requested(self.run) if self.world.rank == self.world.node_ranks[0] else ""
        if from_folder not in ("", last, request):
            request = from_folder
            self._store.set("stacks", request)
        elif self._stacks_wanted and now - written_at > SAME_REQUEST_SECONDS and request in ("", last):
            request = new_request()
            self._store.set("stacks", request)
        self._stacks_wanted = False
        if request not in ("", last):
            self._write_stacks(request)
            self._stacks_written = (request, now)

    def _write_stacks(self, request: str) -> None:
        here, seconds = self._status, time.monotonic() - self._phase_began
        headline = (
            f"{here} of {self.world.size}, process {os.getpid()}, {datetime.now().astimezone().isoformat()}, "
            f"in {here.activity} for {seconds:.1f} s"
        )
        try:
            write_stacks(self.run, request, self.world.rank, headline)
        except Exception as error:  # whatever it is, it must not end this thread
            say(f"fastvit: {here} could not write its stack traces: {error}", file=sys.stderr)

    # ---- failure of a collective operation, or of a rank that reports its own

    def _settle_failure(self, now: float) -> None:
        said = self._store.get("failure").decode()
        lost: list[RankStatus] = []
        if not said:
            message = self._own_failure
            if message is None:
                assert self._failed_at is not None
                if now - self._failed_at <= _SILENT_SECONDS + _BEAT_SECONDS:
                    return  # which ranks have fallen silent is not known yet
                living = {status.rank for status in self._living()}
                lost = [status for status in self._statuses if status.rank not in living]
                message = describe_loss(lost, self._collective_failure)
            said = self._store.compare_set("failure", "", json.dumps([self.world.rank, message])).decode()
        speaker, self._failure = json.loads(said)
        if speaker == self.world.rank and self._status.step is not None:
            self._record("failure", self._failure, [status.rank for status in lost] or [speaker])
        self._failure_known.set()

    # ---- hang

    def _hang_report(self, now: float) -> str:
        message, ranks = describe_hang(self._statuses, self._silent(), now - self._progress_seen)
        living = [status.rank for status in self._living()]
        return json.dumps(
            {
                "request": new_request(),
                "message": message,
                "ranks": ranks,
                "speaker": min(living),
                "living": len(living),
            }
        )

    def _leave_together(self, request: str, message: str, ranks: list[int], speaker: int, living: int) -> NoReturn:
        self._leaving_since = time.monotonic()
        self._write_stacks(request)
        try:
            self._store.add("hang_written", 1)
            deadline = time.monotonic() + _TOGETHER_SECONDS
            if speaker == self.world.rank:
                while int(self._store.get("hang_written")) < living and time.monotonic() < deadline:
                    time.sleep(0.1)
                self._report("hang", message, ranks)
                self._store.set("hang_told", "yes")
                time.sleep(0.5)  # the others leave first: this may be the process that holds the store
            else:
                while not self._store.get("hang_told") and time.monotonic() < deadline + _BEAT_SECONDS:
                    time.sleep(0.1)
        finally:  # if the store is gone, its host has left already
            os._exit(EXIT_RESTART)

    def _leave_alone(self, message: str) -> NoReturn:
        try:
            self._write_stacks(new_request())
            self._report("hang", message, [])
        finally:
            os._exit(EXIT_RESTART)

    def _report(self, kind: Any, message: str, ranks: list[int]) -> None:
        if speaks_for_all():
            self._record(kind, message, ranks)
            say(f"fastvit: error: {message} (stack traces: {self.run.stacks})", file=sys.stderr)

    def _record(self, kind: Any, message: str, ranks: list[int]) -> None:
        try:
            record_event(self.run, kind, message, ranks=ranks, step=self._status.step)
        except OSError as error:
            say(f"fastvit: {self.run.events} could not be written: {error}", file=sys.stderr)

    # ---- the thread that watches the first

    def _watch_store(self) -> None:
        turn = time.monotonic()
        while not self._stop.wait(_BEAT_SECONDS):
            turn = now = self._restart_clocks_if_suspended(turn)
            if self._leaving_since:  # unless even that takes too long
                if now - self._leaving_since > 4 * _TOGETHER_SECONDS:
                    os._exit(EXIT_RESTART)
                continue
            silence, idle = now - self._store_answered, now - self._phase_began
            bound = self._bound([self._status])
            if self._store_error and idle > min(bound, _STORE_GONE_SECONDS) and not self._failed_at:
                self._leave_alone(
                    f"{self._status} has made no progress for {idle:.0f} s, and the job's store, which rank 0 or "
                    f"its launcher holds, is gone: {self._store_error}"
                )
            if silence > _SUSPENDED_SECONDS and idle > bound + _SILENT_SECONDS:
                self._leave_alone(
                    f"{self._status} has made no progress for {idle:.0f} s, and the job's store, which rank 0 or "
                    f"its launcher holds, has not answered for {silence:.0f} s"
                )

    def _restart_clocks_if_suspended(self, turn: float) -> float:
        """Returns the time; if this process has been stopped since `turn`, all waiting times start again."""
        now = time.monotonic()
        if now - turn > _SUSPENDED_SECONDS:
            self._phase_began = self._progress_seen = self._store_answered = now
            self._heard = [now] * self.world.size
        return now


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
