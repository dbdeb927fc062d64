"""Checkpoints in an object store (s3://, gs://, ...) or whatever else fsspec knows.

An object is there whole or not at all, but several are not written at once: the manifest makes a checkpoint complete,
and is the last object of it to be written and the first to be removed.
"""

import contextlib
import mmap
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from fastvit_engine.checkpoint.format import MANIFEST, DamagedCheckpoint
from fastvit_engine.checkpoint.store import is_owner_name, is_step_name, name_in_latest, step_of
from fastvit_engine.shown import public_url
from fastvit_engine.storage.object_store import FINAL_ERRNOS, FINAL_ERRORS, one_line, require_package

_CHUNK = 2**23  # bytes of one request
_PAUSES = (0.5, 2.0, 8.0)  # seconds before each further attempt, besides what the store's client does by itself
_SETTLE_SECONDS = 1.0  # between writing an owner record and reading it back
T = TypeVar("T")


class RemoteStore:
    """A CheckpointStore in an object store."""

    def __init__(self, url: str) -> None:
        require_package(url)
        self.url = url.rstrip("/")
        self.fs, self.root = url_to_fs(self.url)

    def describe(self, name: str) -> str:
        return f"{public_url(self.url)}/{name}"

    def names(self) -> list[str]:
        complete = [name for name in self._prefixes() if self._try(self.fs.exists, self._path(name, MANIFEST))]
        return sorted(complete, key=step_of)

    def latest(self) -> str | None:
        try:
            return name_in_latest(self._try(self.fs.cat_file, self._path("latest")))
        except FileNotFoundError:
            return None

    def read(self, name: str, file: str) -> bytes:
        return self._try(self.fs.cat_file, self._path(name, file))

    def map(self, name: str, file: str, size: int, start: int, stop: int) -> mmap.mmap:
        path, where = self._path(name, file), f"{self.describe(name)}/{file}"
        try:
            found = self._try(self.fs.info, path)["size"]
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{where} does not exist") from error
        if found != size:
            raise DamagedCheckpoint(f"{where} has {found:,} bytes instead of {size:,}")
        with tempfile.TemporaryFile(prefix="fastvit-checkpoint-") as copy:
            copy.truncate(size)  # with a hole before `start`
            copy.seek(start)
            for first in range(start, stop, _CHUNK):
                end = min(first + _CHUNK, stop)
                chunk = self._try(self.fs.cat_file, path, start=first, end=end)
                if len(chunk) != end - first:
                    raise OSError(f"{where}: {len(chunk)} bytes came of [{first}, {end})")
                copy.write(chunk)
            copy.flush()
            return mmap.mmap(copy.fileno(), 0)

    def clean(self) -> None:
        complete = self.names()
        for name in self._prefixes():
            if name not in complete:
                self.discard(name)

    def prepare(self, name: str, size: int) -> None:
        if name in self._prefixes():
            self.remove(name)

    def write(self, name: str, file: str, chunks: Iterable[memoryview]) -> None:
        with self.fs.open(self._path(name, file), "wb") as opened:  # in parts; the object appears on closing
            for chunk in chunks:
                opened.write(chunk)

    def publish(self, name: str, manifest: bytes) -> None:
        self._try(self.fs.pipe_file, self._path(name, MANIFEST), manifest)

    def point_latest(self, name: str) -> None:
        self._try(self.fs.pipe_file, self._path("latest"), name.encode())

    def discard(self, name: str) -> None:
        if name in self._prefixes():
            self._try(self.fs.rm, self._path(name), recursive=True)

    def remove(self, name: str) -> None:
        if self._try(self.fs.exists, self._path(name, MANIFEST)):
            self._try(self.fs.rm_file, self._path(name, MANIFEST))
        self.discard(name)

    def owners(self) -> list[str]:
        return [name for name in self._listed() if is_owner_name(name)]

    def read_owner(self, name: str) -> tuple[bytes, float | None]:
        return self._try(self.fs.cat_file, self._path(name)), None

    def create_owner(self, name: str, content: bytes) -> bool:
        path = self._path(name)
        try:
            self._try(self.fs.pipe_file, path, content, mode="create")
        except FileExistsError:
            return False
        time.sleep(_SETTLE_SECONDS)  # a store that ignores the condition lets the last of several writers win
        try:
            return self._try(self.fs.cat_file, path) == content
        except FileNotFoundError:
            return False

    def refresh_owner(self, name: str, content: bytes) -> None:
        self.fs.invalidate_cache()
        if not self._try(self.fs.exists, self._path(name)):
            raise FileNotFoundError(self.describe(name))
        self._try(self.fs.pipe_file, self._path(name), content)

    def remove_owner(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._try(self.fs.rm_file, self._path(name))

    def _path(self, *parts: str) -> str:
        return "/".join([self.root, *parts])

    def _prefixes(self) -> list[str]:
        """The names under which anything lies, complete or not."""
        return [name for name in self._listed() if is_step_name(name)]

    def _listed(self) -> list[str]:
        self.fs.invalidate_cache()
        try:
            listed = self._try(self.fs.ls, self.root, detail=False)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in listed]

    def _try(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Calls a method of the store, a few times if the failure may pass. Raises OSError if it does not."""
        for pause in (*_PAUSES, None):
            try:
                return call(*arguments, **named)
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # each package has its own classes
                final = getattr(error, "errno", None) in FINAL_ERRNOS or type(error).__name__ in FINAL_ERRORS
                final = final or isinstance(error, PermissionError)
                if final or pause is None:
                    kind = PermissionError if final else OSError
                    raise kind(f"{public_url(self.url)}: {one_line(error)}") from error
            time.sleep(pause)
        raise AssertionError("unreachable")
