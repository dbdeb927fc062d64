"""`events.jsonl`: what happened to a run besides its steps, one JSON object a line, appended by whoever saw it.

Every process of a job and the launcher above it may write: a line is one `write` to a file opened for appending, so
lines of several writers never mix. Nothing is ever removed: a rewind drops rows of `metrics.jsonl`, but not the event
that says so.
"""

import json
import os
import socket
from datetime import datetime
from typing import Any, Literal, NotRequired, TypedDict, get_args

from fastvit_engine.errors import UserError
from fastvit_engine.observe.run_folder import RunFolder

Kind = Literal[
    "start",  # a job began or went on: world_size, zero_stage, hosts
    "stop",  # it ended in order: reason "finished" or "preempted"
    "failure",  # it ended out of order: the cause, and the ranks at fault where they are known
    "restart",  # a launcher starts the processes again
    "checkpoint",  # one was published: path, seconds_blocked, seconds_written, bytes
    "checkpoint_failed",  # one could not be written; the one before it stays
    "checkpoint_damaged",  # one could not be read; the one before it was used
    "anomaly",  # a loss, gradient or parameter that training must not go on with
    "rewind",  # back to a checkpoint: from_step, to_step
    "skip",  # samples left out on purpose after a rewind: samples [first, last)
    "hang",  # no step in the allowed time: the ranks that are missing or late, and where they stood
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


def record_event(run: RunFolder, event: Kind, message: str, **facts: Any) -> None:
    """Appends one event to the run's `events.jsonl` and flushes it to disk. `facts`: numbers, texts and lists."""
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
    line = json.dumps({**row, **facts}) + "\n"
    run.path.mkdir(parents=True, exist_ok=True)
    file = os.open(run.events, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
        os.fsync(file)
    finally:
        os.close(file)


def read_events(run: RunFolder) -> list[Event]:
    """The events in the order written; none where the run has no such file. A half-written last line is left out.

    UserError where another line is no event.
    """
    if not run.events.exists():
        return []
    lines = run.events.read_bytes().splitlines()
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            if not all(key in event for key in ("time", "event", "message")):
                raise ValueError("a key is missing")
        except (ValueError, TypeError) as error:
            if number == len(lines):  # its writer was killed inside it
                break
            raise UserError(f"{run.events} line {number} is no event: the file is damaged, remove that line") from error
        events.append(event)
    return events
