"""What checkpoints are kept in: a folder, or a prefix of an object store."""

import mmap
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from fastvit_engine.checkpoint.format import MANIFEST, DamagedCheckpoint, Manifest
from fastvit_engine.errors import UserError
from fastvit_engine.observe.disk import unreadable

LONGEST_NAME = 1000  # bytes of a file `latest`; more is damage


class CheckpointStore(Protocol):
    """Checkpoints under names `step-N`, which are complete or absent, and the name of the `latest`, for people.

    The newest complete checkpoint is the one to resume from: a full disk or a kill can leave `latest` behind it.

    Every method but `describe` raises OSError if the disk or the store fails.
    """

    has_checksums: bool  # whether the tensors of its checkpoints were summed

    def describe(self, name: str) -> str:
        """Path or URL of a checkpoint, or of what else lies here."""

    def names(self) -> list[str]:
        """The complete checkpoints, the oldest first."""

    def latest(self) -> str | None:
        """What `latest` holds, which is the name of a checkpoint unless it is damaged; None if there is no `latest`."""

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
        """Completes a checkpoint whose files are all written."""

    def point_latest(self, name: str) -> None:
        """Writes the name of a complete checkpoint into `latest`."""

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
        """Raises DamagedCheckpoint if the manifest is missing or damaged, and as `unreadable` says."""
        where = f"{self}/{MANIFEST}"
        try:
            return Manifest.from_json(self.store.read(self.name, MANIFEST), where)
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{where} does not exist: {self} is not a complete checkpoint") from error
        except OSError as error:
            raise unreadable(where, error) from error


def usable_checkpoints(store: CheckpointStore) -> list[Checkpoint]:
    """The complete checkpoints, the newest first; none if the run has none.

    One that `latest` names and that is missing is among them if it would be the newest: reading it says what is wrong.
    Raises as `unreadable` says, and UserError if `latest` is damaged and there is no checkpoint.
    """
    names, latest = _look(store)
    if latest is not None and is_step_name(latest) and (not names or step_of(latest) > step_of(names[0])):
        names.insert(0, latest)
    if not names and latest is not None:
        raise UserError(
            f"{store.describe('latest')} names no checkpoint, and there is none that is complete: restore them, or "
            "remove that file to start from the beginning"
        )
    return [Checkpoint(store, name) for name in names]


def doubt_about_latest(store: CheckpointStore) -> str | None:
    """A sentence for the user if `latest` does not name the newest complete checkpoint, which is used all the same."""
    names, latest = _look(store)
    if not names or latest == names[0]:
        return None
    newest, where = Checkpoint(store, names[0]), store.describe("latest")
    if latest is None:
        return f"there is no {where}: continuing from {newest}, the newest checkpoint that is complete"
    if not is_step_name(latest):
        return f"{where} is damaged: continuing from {newest}, the newest checkpoint that is complete"
    if step_of(latest) > step_of(names[0]):
        return None  # which is reported as damage of that checkpoint
    return (
        f"{where} names {latest}, and {newest} is newer and complete: continuing from that; to continue from an older "
        "one, move the newer ones away"
    )


def _look(store: CheckpointStore) -> tuple[list[str], str | None]:
    """The names of the complete checkpoints, the newest first, and what `latest` holds."""
    try:
        return store.names()[::-1], store.latest()
    except OSError as error:
        raise unreadable(store.describe(""), error) from error


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def is_step_name(name: str) -> bool:
    return re.fullmatch(r"step-[0-9]{1,18}", name) is not None


def name_in_latest(content: bytes) -> str:
    """What a file `latest` holds, as text that can be compared with names, however damaged."""
    return content[:LONGEST_NAME].decode("utf-8", "backslashreplace").strip()
