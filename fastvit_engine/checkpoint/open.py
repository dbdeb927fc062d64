"""Opening the place where a run keeps its checkpoints: a folder or an object store."""

from pathlib import Path

from fastvit_engine.checkpoint.local import LocalPlace
from fastvit_engine.checkpoint.place import Place
from fastvit_engine.checkpoint.remote import RemotePlace
from fastvit_engine.config import CheckpointConfig
from fastvit_engine.observe.run_folder import RunFolder


def place_of(settings: CheckpointConfig, run: RunFolder) -> Place:
    """Where the configuration says that the checkpoints of a run lie; UserError where that cannot be opened."""
    return open_place(settings.path or str(run.checkpoints))


def open_place(location: str) -> Place:
    """A folder, or a URL of a store that fsspec knows."""
    if "://" in location and not location.startswith("file://"):
        return RemotePlace(location)
    return LocalPlace(Path(location.removeprefix("file://")))
