"""The folder that `fastvit data make` writes to: on a local disk, or in an object store.

Until all shards are made, what is known of them is in the folder dataset.unfinished beside them: the packing, a receipt
for each shard, and what sources had to be unpacked to. In an object store the packing is one object, since several
are not written at once.
"""

import contextlib
import errno
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, Protocol

from fastvit_engine.data.shards.archive import stamp_of_tag
from fastvit_engine.data.shards.names import UNFINISHED_NAME
from fastvit_engine.data.shards.remote_path import AnyPath, RemotePath, check_writable, is_remote
from fastvit_engine.files import atomic_folder, atomic_write, atomic_writer
from fastvit_engine.storage import remote_files
from fastvit_engine.unpack import unpack

_AT_ONCE = 32  # requests for small objects
_RECEIPTS = "receipts"
_SHARDS = ("train-*.tar", "eval-*.tar")


class Output(Protocol):
    """A folder of shards that is being made. Files in it are there whole or not at all. Methods raise OSError."""

    path: AnyPath
    unpacked: AnyPath  # folder for what sources are unpacked to
    shared_folder: Path | None  # that every machine with workers must see; None: a store, which all see

    def exists(self) -> bool: ...

    def is_begun(self) -> bool:
        """Whether there is anything of an unfinished data set."""

    def is_empty(self) -> bool: ...

    def begin(self) -> None: ...

    def stored_packing(self) -> Path | None:
        """A local folder with the packing that has been saved, None if none has."""

    def save_packing(self, write: Callable[[Path], None]) -> Path:
        """Stores the files that `write` puts into a local folder, unless there are some; returns those that are."""

    def receipts(self) -> dict[str, bytes]:
        """What `write_receipt` has stored, by the name of the shard."""

    def write_receipt(self, shard: str, content: bytes, temporary: Path) -> None: ...

    def temporary_folder(self, name: str) -> AbstractContextManager[Path]:
        """A local folder for files that are being written."""

    def new_shard(self, name: str, temporary: Path) -> AbstractContextManager[BinaryIO]:
        """A file that becomes a shard when the block ends, and disappears if the block raises."""

    def stamps(self, shards: Sequence[str]) -> dict[str, tuple[int, int | None]]:
        """(bytes, a number for the version if there is one) of the shards that are there."""

    def write(self, name: str, content: bytes) -> None:
        """Writes a file beside the shards."""

    def finish(self) -> None:
        """Removes what is known of the unfinished data set."""

    def abandon(self, *, remove_folder: bool) -> None:
        """Removes what was begun, shards without a receipt too."""


class LocalOutput:
    """An Output on a local disk."""

    def __init__(self, path: Path) -> None:
        self.path: AnyPath = path
        self._path = path
        self._unfinished = path / UNFINISHED_NAME
        self.shared_folder: Path | None = self._unfinished
        self._packing = self._unfinished / "packing"
        self.unpacked: AnyPath = self._unfinished / "unpacked"

    def exists(self) -> bool:
        return self._path.exists()

    def is_begun(self) -> bool:
        return self._unfinished.exists()

    def is_empty(self) -> bool:
        return not any(self._path.iterdir())

    def begin(self) -> None:
        (self._unfinished / _RECEIPTS).mkdir(parents=True, exist_ok=True)

    def stored_packing(self) -> Path | None:
        earlier = self._unfinished / "plan"  # of an earlier version
        return next((folder for folder in (self._packing, earlier) if folder.exists()), None)

    def save_packing(self, write: Callable[[Path], None]) -> Path:
        with atomic_folder(self._packing) as folder:
            write(folder)
        return self._packing

    def receipts(self) -> dict[str, bytes]:
        found = {}
        for path in (self._unfinished / _RECEIPTS).glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                found[path.stem] = path.read_bytes()
        return found

    def write_receipt(self, shard: str, content: bytes, temporary: Path) -> None:
        with atomic_writer(self._unfinished / _RECEIPTS / f"{shard}.json", temporary_folder=temporary) as file:
            file.write(content)

    @contextlib.contextmanager
    def temporary_folder(self, name: str) -> Iterator[Path]:
        folder = self._unfinished / name
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def new_shard(self, name: str, temporary: Path) -> Iterator[BinaryIO]:
        with atomic_writer(self._path / name, temporary_folder=temporary) as file:
            yield file

    def stamps(self, shards: Sequence[str]) -> dict[str, tuple[int, int | None]]:
        found: dict[str, tuple[int, int | None]] = {}
        for name in shards:
            with contextlib.suppress(FileNotFoundError):
                found[name] = (self._path / name).stat().st_size, None
        return found

    def write(self, name: str, content: bytes) -> None:
        atomic_write(self._path / name, content)

    def finish(self) -> None:
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def abandon(self, *, remove_folder: bool) -> None:
        for pattern in _SHARDS:
            for path in self._path.glob(pattern):
                path.unlink()
        shutil.rmtree(self._unfinished)
        if remove_folder:
            with contextlib.suppress(OSError):  # not empty
                self._path.rmdir()


class RemoteOutput:
    """An Output in an object store."""

    def __init__(self, path: RemotePath, local: Path) -> None:
        check_writable(path.url)
        self.path: AnyPath = path
        self._url, self._local = path.url, local  # a folder of this process alone
        self._unfinished = f"{self._url}/{UNFINISHED_NAME}"
        self._packing = f"{self._unfinished}/packing.tar"
        self.shared_folder: Path | None = None
        self.unpacked: AnyPath = RemotePath.of(f"{self._unfinished}/unpacked")

    def exists(self) -> bool:
        return next(iter(remote_files.list_files(self._url)), None) is not None

    def is_begun(self) -> bool:
        return next(iter(remote_files.list_files(self._unfinished)), None) is not None

    def is_empty(self) -> bool:
        return not self.exists()

    def begin(self) -> None:
        remote_files.write(f"{self._unfinished}/begun", b"")  # whoever may not write is told before the work begins

    def stored_packing(self) -> Path | None:
        try:
            content = RemotePath.of(self._packing).open()
        except FileNotFoundError:
            return None
        folder = self._local / "packing"
        folder.mkdir(exist_ok=True)
        with content, tarfile.open(fileobj=content) as packed:
            unpack(packed, folder)
        return folder

    def save_packing(self, write: Callable[[Path], None]) -> Path:
        folder = self._local / "new-packing"
        folder.mkdir()
        write(folder)
        with tempfile.TemporaryFile(dir=self._local) as file:
            with tarfile.open(fileobj=file, mode="w") as packed:
                for path in sorted(folder.iterdir()):
                    packed.add(path, path.name)
            shutil.rmtree(folder)
            with contextlib.suppress(FileExistsError):  # of another part, which was faster
                remote_files.write(self._packing, file, create=True)
        stored = self.stored_packing()
        if stored is None:
            raise FileNotFoundError(f"{self._packing} has disappeared")
        return stored

    def receipts(self) -> dict[str, bytes]:
        names = [
            name for name, _ in remote_files.list_files(f"{self._unfinished}/{_RECEIPTS}") if name.endswith(".json")
        ]

        def read(name: str) -> tuple[str, bytes]:
            return name.removesuffix(".json"), remote_files.read(f"{self._unfinished}/{_RECEIPTS}/{name}")

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return dict(pool.map(read, names))

    def write_receipt(self, shard: str, content: bytes, temporary: Path) -> None:
        remote_files.write(f"{self._unfinished}/{_RECEIPTS}/{shard}.json", content)

    @contextlib.contextmanager
    def temporary_folder(self, name: str) -> Iterator[Path]:
        yield self._local

    @contextlib.contextmanager
    def new_shard(self, name: str, temporary: Path) -> Iterator[BinaryIO]:
        with tempfile.TemporaryFile(prefix="fastvit-make-") as file:  # not in `temporary`: this may be another machine
            yield file
            remote_files.write(f"{self._url}/{name}", file)

    def stamps(self, shards: Sequence[str]) -> dict[str, tuple[int, int | None]]:
        def look(name: str) -> tuple[int, int] | None:
            version = remote_files.version_of(f"{self._url}/{name}")
            return None if version is None else (version.size, stamp_of_tag(version.tag))

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = dict(zip(shards, pool.map(look, shards), strict=True))
        return {name: stamp for name, stamp in found.items() if stamp is not None}

    def write(self, name: str, content: bytes) -> None:
        remote_files.write(f"{self._url}/{name}", content)

    def finish(self) -> None:
        for name, _ in list(remote_files.list_files(self._unfinished)):
            remote_files.delete(f"{self._unfinished}/{name}")

    def abandon(self, *, remove_folder: bool) -> None:
        for name, _ in list(remote_files.list_files(self._url)):
            if any(fnmatchcase(name, pattern) for pattern in _SHARDS):
                remote_files.delete(f"{self._url}/{name}")
        self.finish()


@contextlib.contextmanager
def open_output(path: AnyPath) -> Iterator[Output]:
    """The folder `path` as an output."""
    if isinstance(path, Path):
        yield LocalOutput(path)
        return
    with tempfile.TemporaryDirectory(prefix="fastvit-make-") as local:
        yield RemoteOutput(path, Path(local))


def reason_of(error: OSError) -> str:
    """Why a file cannot be written."""
    return error.strerror or str(error)


def advice_for(output: Output, error: OSError, again: str = "") -> str:
    """What to do if a shard cannot be written. `again`: what follows once there is room."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "choose another --out"
    if is_remote(str(output.path)):
        return f"make room in {tempfile.gettempdir()}{again}, or set TMPDIR to a folder of another disk"
    return f"make room{again}, or choose another --out"
