"""What happened to a run besides its steps: which events tell of trouble, and which were planned."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import NamedTuple

from fastvit_engine.observe.events import Event
from fastvit_engine.observe.metrics import TrainRow
from fastvit_engine.observe.units import counted

# Kinds of events that tell of trouble: in the singular and in the plural.
KINDS: Mapping[str, tuple[str, str]] = {
    "rewind": ("rewind", "rewinds"),
    "anomaly": ("anomaly", "anomalies"),
    "failure": ("failure", "failures"),
    "hang": ("hang", "hangs"),
    "slow_rank": ("slow rank", "slow ranks"),
    "fp8_fallback": ("fallback to bf16", "fallbacks to bf16"),
    "checkpoint_failed": ("failed checkpoint", "failed checkpoints"),
    "checkpoint_damaged": ("damaged checkpoint", "damaged checkpoints"),
}


class Moment(NamedTuple):
    """When something happened, and what."""

    step: int
    text: str


class Track(NamedTuple):
    """The moments of one kind."""

    name: str
    style: str  # class in the style sheet
    moments: list[Moment]


class EventRow(NamedTuple):
    """An event as the table shows it."""

    severity: str  # class in the style sheet
    when: str
    what: str
    step: str
    message: str
    who: str


def restarts(events: Sequence[Event]) -> list[Event]:
    """The starts after which a run had to repeat something, or might have had to: those that nobody had planned."""
    return [event for event, planned in _later_starts(events) if not planned]


def continuations(events: Sequence[Event]) -> list[Event]:
    """The starts after a requested stop, and of a run that was made longer when it was done."""
    return [event for event, planned in _later_starts(events) if planned]


def _later_starts(events: Sequence[Event]) -> list[tuple[Event, bool]]:
    """The starts after the first, and whether each was planned: the run before it had ended in order."""
    found: list[tuple[Event, bool]] = []
    before: Event | None = None
    stopped = False
    for event in events:
        if event["event"] == "stop":
            stopped = True
        elif event["event"] == "start":
            if before is not None:
                done = event.get("step") == before.get("total_steps", math.nan)
                found.append((event, stopped or done))
            before, stopped = event, False
    return found


def describe_incidents(events: Sequence[Event], train: Sequence[TrainRow]) -> str:
    """The incidents, as in "2 restarts, 1 rewind, 1 hang"; empty if nothing went wrong."""
    counts = [(len(restarts(events)), "restart", "restarts")]
    counts += [(sum(event["event"] == kind for event in events), *words) for kind, words in KINDS.items()]
    counts.append((bad_samples(train), "bad sample", "bad samples"))
    return ", ".join(counted(count, *words) for count, *words in counts if count)


def bad_samples(train: Sequence[TrainRow]) -> int:
    """Training images that could not be used."""
    return train[-1].get("bad_samples", 0) if train else 0


def tracks(events: Sequence[Event], train: Sequence[TrainRow]) -> list[Track]:
    """What happened at which step, by kind; kinds that did not occur are left out."""
    found = [Track("restart", "restart", _moments(restarts(events)))]
    for kind, (name, _) in KINDS.items():
        style = "rewind" if kind == "rewind" else "bad"
        found.append(Track(name, style, _moments([event for event in events if event["event"] == kind])))
    found.append(Track("bad samples", "bad", _bad_sample_moments(train)))
    found.append(Track("planned start", "planned", _moments(continuations(events))))
    changes = [event for event in events if event["event"] in ("batch_change", "configuration")]
    found.append(Track("changed setting", "planned", _moments(changes)))
    found.append(Track("checkpoint", "checkpoint", _moments([e for e in events if e["event"] == "checkpoint"])))
    return [track for track in found if track.moments]


def _bad_sample_moments(train: Sequence[TrainRow]) -> list[Moment]:
    moments, before = [], 0
    for row in train:
        now = row.get("bad_samples", before)
        if now > before:
            moments.append(Moment(row["step"], f"{counted(now - before, 'bad sample')} up to step {row['step']:,}"))
        before = now
    return moments


def _moments(events: Sequence[Event]) -> list[Moment]:
    return [
        Moment(step, f"{when(event)}: {event['message']}") for event in events if (step := step_of(event)) is not None
    ]


def without_repeats(events: Sequence[Event]) -> list[Event]:
    """Keeps the last of several events of one kind in a row, which says how many there were."""
    rows = []
    for _, group in groupby(events, key=lambda event: event["event"]):
        *before, last = group
        row = last.copy()
        if before:
            row["message"] += f" (and {len(before):,} such before, from {when(before[0])} on)"
        rows.append(row)
    return rows


def event_rows(events: Sequence[Event]) -> list[EventRow]:
    """The events as a table shows them."""
    return [
        EventRow(
            severity=_severity(event),
            when=when(event),
            what=event["event"].replace("_", " "),
            step="" if (step := step_of(event)) is None else f"{step:,}",
            message=event["message"],
            who=_who(event),
        )
        for event in events
    ]


def _severity(event: Event) -> str:
    if event["event"] in ("failure", "hang", "anomaly", "checkpoint_failed", "checkpoint_damaged"):
        return "bad"
    return "plain" if event["event"] in ("start", "stop", "checkpoint") else "notable"


def when(event: Event) -> str:
    """In the zone of the one who wrote it, to the second."""
    try:
        return f"{datetime.fromisoformat(event['time']):%Y-%m-%d %H:%M:%S}"
    except ValueError:
        return event["time"]


def step_of(event: Event) -> int | None:
    """The step at which it happened; for a rewind, the step before it."""
    step = event.get("from_step", event.get("step"))
    return step if isinstance(step, int) else None


def _who(event: Event) -> str:
    name = f"rank {event['rank']}" if "rank" in event else "launcher"
    return f"{name}, {event['host']}" if event.get("host") else name
