"""What checkpoints are kept in: a folder, or a prefix of an object store."""

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from fastvit_engine.checkpoint.format import MANIFEST, DamagedCheckpoint, Manifest
from fastvit_engine.errors import UserError


class CheckpointStore(Protocol):
    """Checkpoints under names `step-N`, which are complete or absent, and the name of the `latest`.

    Every method but `describe` raises OSError if the disk or the store fails.
    """

    def describe(self, name: str) -> str:
        """Path or URL of a checkpoint, or of what else lies here."""

    def names(self) -> list[str]:
        """The complete checkpoints, the oldest first."""

    def latest(self) -> str | None:
        """The name of the checkpoint to continue from; None if there is none yet."""

    def read(self, name: str, file: str) -> bytes:
        """A whole small file of a checkpoint."""

    def map(self, name: str, file: str, size: int, start: int, stop: int) -> mmap.mmap:
        """Bytes [start, stop) of a file in memory, at the same positions as in the file, as long as it is referred to.

        Raises DamagedCheckpoint if the file is missing or has another size.
        """

    def clean(self) -> None:
        """Removes what unfinished saves and removals have left. Called by one process, before any `prepare`."""

    def prepare(self, name: str, size: int) -> None:
        """Makes room for the files of a checkpoint of `size` bytes. Raises OSError if they would not fit."""

    def write(self, name: str, file: str, chunks: Iterable[memoryview]) -> None:
        """Writes a file of a checkpoint that was prepared; it is durable on return."""

    def publish(self, name: str, manifest: bytes) -> None:
        """Completes a checkpoint whose files are all written, and makes it the latest."""

    def discard(self, name: str) -> None:
        """Removes a checkpoint that was prepared and not published."""

    def remove(self, name: str) -> None:
        """Removes a complete checkpoint; killed in the middle, it leaves the whole or nothing of that name."""

    def owners(self) -> list[str]:
        """The names of the owner records that lie here, in any order. See `owner.py`."""

    def read_owner(self, name: str) -> tuple[bytes, float | None]:
        """An owner record, and the time of its last heartbeat if the content does not tell it."""

    def create_owner(self, name: str, content: bytes) -> bool:
        """Creates an owner record; False if it exists. Of several writers at once, one succeeds."""

    def refresh_owner(self, name: str, content: bytes) -> None:
        """A heartbeat. Raises FileNotFoundError if the record is gone, which is not created again."""

    def remove_owner(self, name: str) -> None:
        """Removes an owner record, if it exists."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint, by name."""

    store: CheckpointStore
    name: str

    @property
    def step(self) -> int:
        return step_of(self.name)

    def __str__(self) -> str:
        return self.store.describe(self.name)

    def read_manifest(self) -> Manifest:
        """Raises DamagedCheckpoint if the manifest is missing or damaged."""
        where = f"{self}/{MANIFEST}"
        try:
            return Manifest.from_json(self.store.read(self.name, MANIFEST), where)
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{where} does not exist: {self} is not a complete checkpoint") from error
        except OSError as error:
            raise UserError(f"{where} cannot be read ({error}): check the disk or the store, then resume") from error


def usable_checkpoints(store: CheckpointStore) -> list[Checkpoint]:
    """The latest checkpoint and, after it, the complete ones that are older; none if the run has none.

    Raises UserError if the disk or the store cannot say.
    """
    try:
        latest = store.latest()
        newest_first = [Checkpoint(store, name) for name in reversed(store.names())]
    except OSError as error:
        raise UserError(f"{store.describe('')} cannot be read ({error}): check checkpoint.path, then resume") from error
    if latest is None:
        return []
    if is_step_name(latest):
        newest_first = [checkpoint for checkpoint in newest_first if checkpoint.step < step_of(latest)]
    return [Checkpoint(store, latest), *newest_first]


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def is_step_name(name: str) -> bool:
    return name.startswith("step-") and name.removeprefix("step-").isdigit()


def is_owner_name(name: str) -> bool:
    return name.startswith("owner-") and name.endswith(".json") and name[6:-5].isdigit()
