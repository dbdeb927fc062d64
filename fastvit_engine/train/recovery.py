"""`recovery.json`: what a run remembers of every time it went back to a checkpoint.

The file is written before the run continues. So a run that is killed between going back and its next checkpoint still
leaves out the same samples, and continues to count. Every checkpoint's manifest has the same in it, for a run folder
that is lost. Samples can also be left out by hand: add their positions to `skipped`; steps that have one are left out.
"""

import json
from typing import Any

from fastvit_engine.checkpoint import Recovery
from fastvit_engine.errors import UserError
from fastvit_engine.files import atomic_write, read_json_lines
from fastvit_engine.observe.disk import insist, unreadable
from fastvit_engine.observe.run_folder import RunFolder


def save_recovery(run: RunFolder, recovery: Recovery) -> None:
    """Writes the file; it is durable on return. Raises RestartError if the disk is full or lost for long."""

    def write() -> None:
        run.path.mkdir(parents=True, exist_ok=True)
        atomic_write(run.recovery, json.dumps(recovery.to_json()) + "\n")

    insist(write, str(run.recovery))


def load_recovery(run: RunFolder) -> Recovery:
    """What the run remembers; nothing for a new run. Raises UserError if the file is damaged, or as `unreadable` says.

    Runs of earlier versions have no such file: they are remembered from their events, which is the only time that
    `events.jsonl` is read back (see `save_recovery`, which every start calls).
    """
    try:
        text = run.recovery.read_bytes()
    except FileNotFoundError:
        return _from_events(run)
    except OSError as error:
        raise unreadable(run.describe(run.recovery), error) from error
    try:
        return Recovery.from_json(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{run.describe(run.recovery)} is damaged ({error}): correct it, or remove it to have it made again from "
            f"{run.describe(run.events)}"
        ) from error


def _from_events(run: RunFolder) -> Recovery:
    """Damaged lines are left out: a run acted on what it had written whole, and on nothing else."""
    if not run.events.exists():
        return Recovery()
    windows: dict[str, list[Any]] = {"skip": [], "anomaly": []}
    rewinds = 0
    for event in read_json_lines(run.events):
        rewinds += event.get("event") == "rewind"
        if event.get("event") in windows and "samples" in event:
            windows[event["event"]].append(event["samples"])
    content = {"skipped": windows["skip"], "failed": windows["anomaly"], "rewinds": rewinds}
    try:
        return Recovery().merge(Recovery.from_json(content))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{run.describe(run.events)} names samples that are no window ({error}): correct that line"
        ) from error
