"""`events.jsonl`: what happened to a run besides its steps, one JSON object per line, appended by whoever saw it.

Every process of a job and the launcher above it may write; their lines never mix (see `files`). Nothing is ever
removed: a rewind drops rows of `metrics.jsonl`, but not the event that says so.
"""

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast, get_args

from fastvit_engine.files import append_json_lines, read_json_lines
from fastvit_engine.observe.disk import if_possible
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.shown import recorded

Kind = Literal[
    "start",  # a job started or resumed: world_size, zero_stage, total_steps, hosts, config (file in the run folder)
    "configuration",  # a job resumed with other values: changes, each with key, from and to
    "stop",  # it ended in order: reason "finished" or "preempted"
    "failure",  # it failed: the cause, and the ranks at fault if they are known
    "restart",  # a launcher starts the processes again
    "checkpoint",  # one was published: path, seconds_blocked, seconds_written, bytes
    "checkpoint_failed",  # one could not be written; the previous one stays
    "checkpoint_damaged",  # one could not be read; the previous one was used
    "anomaly",  # a loss, gradient or parameter that training must not continue with
    "rewind",  # back to a checkpoint: from_step, to_step
    "batch_change",  # train.global_batch_size was changed on purpose when the run resumed: before, after
    "skip",  # samples left out on purpose after a rewind: samples [first, last)
    "hang",  # no step in the allowed time: the ranks that are missing or late, and what they were doing
    "fp8_fallback",  # layers return from FP8 to bf16 for the rest of the run: layers
    "slow_rank",  # a rank is slower than the others: rank, ratio
]


class Event(TypedDict):
    """One incident; further keys are the facts of its kind."""

    time: str  # ISO 8601 with the zone's offset
    event: Kind
    message: str  # one sentence for people
    host: str
    rank: NotRequired[int]  # of the process that writes; absent for a launcher
    step: NotRequired[int]  # optimizer steps taken when it happened


_listeners: list[Callable[[Event], None]] = []
_made: set[Path] = set()  # run folders that were there when this process first wrote to them


def record_event(run: RunFolder, event: Kind, message: str, **facts: Any) -> None:
    """Appends one event to the run's `events.jsonl`, durably. `facts`: numbers, texts and lists.

    URLs in them are recorded without their secrets. Events are for people: if the disk is full or lost, a warning takes
    their place.
    """
    if event not in get_args(Kind):
        raise ValueError(f"unknown event {event!r}")
    row: dict[str, Any] = {
        "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "event": event,
        "message": message,
        "host": socket.gethostname(),
    }
    if "RANK" in os.environ:
        row["rank"] = int(os.environ["RANK"])
    public = recorded({**row, **facts})
    if_possible(lambda: _append(run, public), str(run.events))
    for listener in list(_listeners):
        listener(public)


@contextmanager
def listening(listener: Callable[[Event], None]) -> Iterator[None]:
    """Calls `listener` with each event that this process records during the block, from the thread that does."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def _append(run: RunFolder, row: Mapping[str, Any]) -> None:
    if run.path not in _made:  # one that has vanished since is not made again
        run.path.mkdir(parents=True, exist_ok=True)
        _made.add(run.path)
    if run.path.exists():
        append_json_lines(run.events, [row])


def read_events(run: RunFolder) -> list[Event]:
    """Reads the events in the order written; none if the run has no such file.

    Half a last line is left out, and so are damaged lines, which stderr counts. Nothing here decides how a run resumes.
    """
    if not run.events.exists():
        return []
    return cast(list[Event], read_json_lines(run.events, _problem, run.describe(run.events)))


def _problem(row: Mapping[str, Any]) -> str | None:
    is_text = all(isinstance(row.get(key), str) for key in ("time", "event", "message"))
    are_numbers = all(
        type(row[key]) is int and abs(row[key]) < 2**63 for key in ("rank", "step", "world_size") if key in row
    )
    return None if is_text and are_numbers else "is not an event"
