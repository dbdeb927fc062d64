"""Checkpoints in an object store (s3://, gs:// or az://).

An object is there whole or not at all, but several are not written at once: the manifest makes a checkpoint complete,
and is the last object of it to be written and the first to be removed.
"""

import contextlib
import mmap
import tempfile
import time
from collections.abc import Iterable

from fastvit_engine.checkpoint.format import MANIFEST, DamagedCheckpoint
from fastvit_engine.checkpoint.store import is_step_name, name_in_latest, step_of
from fastvit_engine.observe.owner_record import is_owner_name
from fastvit_engine.shown import public_url
from fastvit_engine.storage.stores import open_store, store_failures

# Seconds after which a write that must not come late is not tried again. With the last attempt, for which the store's
# timeout is added, it ends before another machine may have taken the run over (`owner.STALE_SECONDS`).
PROMPT_SECONDS = 20.0
_SETTLE_SECONDS = 1.0  # between writing an owner record and reading it back


class RemoteStore:
    """A CheckpointStore in an object store."""

    has_checksums = True

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.store, self.root = open_store(self.url)
        self._prompt_store, _ = open_store(self.url, patience=PROMPT_SECONDS)

    def describe(self, name: str) -> str:
        return f"{public_url(self.url)}/{name}"

    def names(self) -> list[str]:
        with store_failures(self.url):
            complete = [name for name in self._prefixes() if self.store.exists(self._key(name, MANIFEST))]
        return sorted(complete, key=step_of)

    def latest(self) -> str | None:
        try:
            return name_in_latest(self._read("latest"))
        except FileNotFoundError:
            return None

    def read(self, name: str, file: str) -> bytes:
        return self._read(name, file)

    def map(self, name: str, file: str, size: int, start: int, stop: int) -> mmap.mmap:
        key, where = self._key(name, file), f"{self.describe(name)}/{file}"
        try:
            with store_failures(self.url):
                found = self.store.head(key).size
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{where} does not exist") from error
        if found != size:
            raise DamagedCheckpoint(f"{where} has {found:,} bytes instead of {size:,}")
        with tempfile.TemporaryFile(prefix="fastvit-checkpoint-") as copy:
            copy.truncate(size)  # with a hole before `start`
            copy.seek(start)
            with store_failures(self.url):
                for chunk in self.store.open(key, start, stop).chunks if stop > start else ():
                    copy.write(chunk)
            if copy.tell() != stop:
                raise OSError(f"{where}: {copy.tell() - start} bytes came of [{start}, {stop})")
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
        with store_failures(self.url):
            self.store.write_stream(self._key(name, file), chunks)

    def publish(self, name: str, manifest: bytes) -> None:
        with store_failures(self.url):
            self._prompt_store.write(self._key(name, MANIFEST), manifest)

    def point_latest(self, name: str) -> None:
        with store_failures(self.url):
            self._prompt_store.write(self._key("latest"), name.encode())

    def discard(self, name: str) -> None:
        with store_failures(self.url):
            self.store.delete(*[info.key for info in self.store.list_all(self._key(name))])

    def remove(self, name: str) -> None:
        with store_failures(self.url):
            if self.store.exists(self._key(name, MANIFEST)):
                self.store.delete(self._key(name, MANIFEST))
        self.discard(name)

    def owners(self) -> list[str]:
        return [name for name in self._listed() if is_owner_name(name)]

    def read_owner(self, name: str) -> tuple[bytes, float | None]:
        return self._read(name), None

    def create_owner(self, name: str, content: bytes) -> bool:
        try:
            with store_failures(self.url):
                self.store.write(self._key(name), content, create=True)
        except FileExistsError:
            # Perhaps this very content, written by an attempt whose answer was lost.
            return self._holds(name, content)
        time.sleep(_SETTLE_SECONDS)  # a store that ignores the condition lets the last of several writers win
        return self._holds(name, content)

    def refresh_owner(self, name: str, content: bytes) -> None:
        with store_failures(self.url):
            self.store.head(self._key(name))
            self.store.write(self._key(name), content)

    def remove_owner(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), store_failures(self.url):
            self.store.delete(self._key(name))

    def _holds(self, name: str, content: bytes) -> bool:
        try:
            return self._read(name) == content
        except FileNotFoundError:
            return False

    def _read(self, *parts: str) -> bytes:
        with store_failures(self.url):
            return self.store.read(self._key(*parts))

    def _key(self, *parts: str) -> str:
        return "/".join(filter(None, [self.root, *parts]))

    def _prefixes(self) -> list[str]:
        """The names under which anything lies, complete or not."""
        return [name for name in self._listed() if is_step_name(name)]

    def _listed(self) -> list[str]:
        try:
            with store_failures(self.url):
                return [info.key.rpartition("/")[2] for info in self.store.list_folder(self.root)]
        except FileNotFoundError:
            return []
