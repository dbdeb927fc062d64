"""Checkpoints in a folder, which all processes of the run must see.

A checkpoint grows under `step-N.partial`; when all of it is on the disk, one rename gives it its name, and only then
does `latest` name it. A kill or a full disk at any moment therefore leaves the one before untouched and usable. What
was renamed is complete, whether or not `latest` could be written.
"""

import contextlib
import errno
import mmap
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from fastvit_engine.checkpoint.format import MANIFEST, DamagedCheckpoint
from fastvit_engine.checkpoint.store import LONGEST_NAME, is_step_name, name_in_latest, step_of
from fastvit_engine.files import atomic_create, atomic_write, flush_to_disk
from fastvit_engine.observe.owner_record import is_owner_name

_SPARE = 2**16  # bytes that a checkpoint leaves free on its disk, for the run's records
_MORE_TRIES = 9


class LocalStore:
    """A CheckpointStore in a file system."""

    has_checksums = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def describe(self, name: str) -> str:
        return str(self.folder / name)

    def names(self) -> list[str]:
        complete = [path.parent.name for path in self.folder.glob(f"*/{MANIFEST}")]
        return sorted(filter(is_step_name, complete), key=step_of)

    def latest(self) -> str | None:
        try:
            with open(self.folder / "latest", "rb") as file:
                return name_in_latest(file.read(LONGEST_NAME))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str, file: str) -> bytes:
        return (self.folder / name / file).read_bytes()

    def map(self, name: str, file: str, size: int, start: int, stop: int) -> mmap.mmap:
        path = self.folder / name / file
        try:
            found = path.stat().st_size
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{path} does not exist") from error
        if found != size:
            raise DamagedCheckpoint(f"{path} has {found:,} bytes instead of {size:,}")
        # Private and writable, although nobody writes: PyTorch warns of memory that it must not write to.
        with open(path, "rb") as opened:
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)

    def clean(self) -> None:
        for leftover in [*self.folder.glob("*.partial"), *self.folder.glob("*.removed")]:
            shutil.rmtree(leftover)

    def prepare(self, name: str, size: int) -> None:
        self.discard(name)
        self._partial(name).mkdir(parents=True)
        free = shutil.disk_usage(self.folder).free
        if free < size + _SPARE:  # found out now, it takes no room from what else is written on this disk
            self.discard(name)
            raise OSError(errno.ENOSPC, f"it takes {size / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free on that disk")

    def write(self, name: str, file: str, chunks: Iterable[memoryview]) -> None:
        with open(self._partial(name) / file, "xb", buffering=0) as opened:  # not what another owner writes by now
            for chunk in chunks:
                while chunk.nbytes:
                    chunk = chunk[opened.write(chunk) :]
            os.fsync(opened.fileno())

    def publish(self, name: str, manifest: bytes) -> None:
        atomic_write(self._partial(name) / MANIFEST, manifest)
        if (self.folder / name).exists():  # a damaged one, which the run has gone back behind
            self.remove(name)
        os.replace(self._partial(name), self.folder / name)
        flush_to_disk(self.folder)

    def point_latest(self, name: str) -> None:
        atomic_write(self.folder / "latest", name)

    def discard(self, name: str) -> None:
        if self._partial(name).exists():
            shutil.rmtree(self._partial(name))

    def remove(self, name: str) -> None:
        doomed = self.folder / f"{name}.removed"
        os.replace(self.folder / name, doomed)
        shutil.rmtree(doomed)

    def owners(self) -> list[str]:
        try:
            return list(filter(is_owner_name, os.listdir(self.folder)))
        except FileNotFoundError:
            return []

    def read_owner(self, name: str) -> tuple[bytes, float | None]:
        with open(self.folder / name, "rb") as opened:  # opening asks a file server for the newest state
            return opened.read(), os.fstat(opened.fileno()).st_mtime

    def create_owner(self, name: str, content: bytes) -> bool:
        for _ in range(_MORE_TRIES):  # another start may make the folder, be refused, and remove it, still empty
            with contextlib.suppress(FileNotFoundError):
                return self._create_owner(name, content)
        return self._create_owner(name, content)

    def _create_owner(self, name: str, content: bytes) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        return atomic_create(self.folder / name, content)

    def refresh_owner(self, name: str, content: bytes) -> None:
        os.utime(self.folder / name)  # which works on a full disk, too

    def remove_owner(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def _partial(self, name: str) -> Path:
        return self.folder / f"{name}.partial"
