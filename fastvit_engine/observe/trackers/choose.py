"""The trackers of a run by their names, and what they need."""

import json
import re
import uuid
from collections.abc import Iterable
from typing import Any

from fastvit_engine.files import atomic_write
from fastvit_engine.observe.disk import if_possible, warn
from fastvit_engine.observe.optional import require
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.observe.trackers.child import TrackedRun
from fastvit_engine.observe.trackers.process import TrackerProcess
from fastvit_engine.observe.trackers.protocol import Tracker
from fastvit_engine.observe.trackers.tensorboard import TensorBoard

_ID = re.compile("[0-9a-f]{32}")
# What must be importable; the extra of this package that brings it has the name of the tracker.
_MODULES = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}


def check_installed(names: Iterable[str]) -> None:
    """Raises UserError, with what to install, if the library of one of these trackers is missing."""
    for name in names:
        require(f"observe.trackers with {name} in it", name, *_MODULES.get(name, (name,)))


def open_trackers(
    names: Iterable[str], run: RunFolder, project: str, config: dict[str, Any], start_step: int, total_steps: int
) -> list[Tracker]:
    """config: without secrets. start_step: training continues from there."""
    trackers: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            trackers.append(TensorBoard(run, start_step))
        else:
            folder = str(run.path.resolve())
            about = TrackedRun(_identity(run), run.name, project, folder, total_steps, config)
            trackers.append(TrackerProcess(f"{__package__}.{name}", about))
    return trackers


def _identity(run: RunFolder) -> str:
    """By which trackers know the run at its next start; new in a folder that has none."""
    try:
        found = json.loads(run.trackers.read_text())
        if isinstance(found, dict) and isinstance(found.get("id"), str) and _ID.fullmatch(found["id"]):
            return str(found["id"])
        problem = "holds no id of a run"
    except FileNotFoundError:
        problem = None
    except (OSError, ValueError, RecursionError):
        problem = "cannot be read"
    if problem:
        warn(f"{run.trackers} {problem}: trackers begin another run")
    identity = uuid.uuid4().hex
    if_possible(lambda: atomic_write(run.trackers, json.dumps({"id": identity})), str(run.trackers))
    return identity
