"""Opens the store that a run keeps its checkpoints in: a folder or an object store."""

from pathlib import Path

from fastvit_engine.checkpoint.local import LocalStore
from fastvit_engine.checkpoint.remote import RemoteStore
from fastvit_engine.checkpoint.store import CheckpointStore
from fastvit_engine.config import CheckpointConfig
from fastvit_engine.observe.run_folder import RunFolder


def store_of(settings: CheckpointConfig, run: RunFolder) -> CheckpointStore:
    """The store that the configuration names for the checkpoints of a run. Raises UserError if it cannot be opened."""
    return open_store(settings.path or run.checkpoint_location)


def another_place(settings: CheckpointConfig) -> str:
    """What a run must have that is to leave the checkpoints there alone."""
    return "another run folder with --out" + (" and another checkpoint.path" if settings.path else "")


def open_store(location: str) -> CheckpointStore:
    """A folder, or a URL of an object store."""
    if "://" in location and not location.startswith("file://"):
        return RemoteStore(location)
    return LocalStore(Path(location.removeprefix("file://")))
