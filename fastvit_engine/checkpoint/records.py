"""The records of a run in an object store: fetched when a process takes the run over, uploaded before each checkpoint.

Records grow line by line, which no object does. So a run writes them to its working folder, and uploads every file that
has changed, whole. Those in the store are the truth: whoever takes the run over, on any machine, replaces its working
folder by them. They are enough for that, because a checkpoint is published only after all records up to it have been
uploaded, and a resume drops later rows. Of events and stack traces, which no resume needs, those that a killed process
could not upload are kept if the run continues on the same machine.
"""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from fastvit_engine.checkpoint.owner import Ownership
from fastvit_engine.checkpoint.remote import PROMPT_SECONDS
from fastvit_engine.errors import RestartError, UserError
from fastvit_engine.files import atomic_write
from fastvit_engine.observe.disk import insist, reason, unreadable, warn
from fastvit_engine.observe.run_folder import WORKING_FOLDERS, RunFolder
from fastvit_engine.storage.stores import open_store, store_failures

_FOLDERS = ("", "configs", "tensorboard")  # that records are in
_RECORD = re.compile(
    r"config\.yaml|configs/config-[0-9]+\.yaml|environment\.json|(metrics|events|bad_samples)\.jsonl|recovery\.json|"
    r"samples\.json|classes\.json|reconstructions\.json|trackers\.json|tensorboard/events\.out\.[A-Za-z0-9._-]+"
)
# Of the processes on this machine: uploaded, and never fetched.
_LOCAL = re.compile(r"stacks/[A-Za-z0-9._-]+\.txt|profile/[A-Za-z0-9._-]+\.(txt|json|json\.gz)")
_LOGS = ("events.jsonl", "bad_samples.jsonl")  # of which no line is ever removed
_AT_ONCE = 2**25  # bytes of a file that is uploaded with one request
_Version = tuple[int, int, int]  # of a file of the working folder


class Records:
    """Fetches and uploads the records of a run; does nothing for a run that has no URL.

    check_owner: raises UserError if this run must not write any more; called before each write. Threads may share one.
    """

    def __init__(self, run: RunFolder, check_owner: Callable[[], None] = lambda: None) -> None:
        self._run, self._check_owner = run, check_owner
        self._uploaded: dict[str, _Version] = {}
        self._lock = threading.Lock()

    def fetch(self) -> None:
        """Replaces the records in the working folder by those in the store.

        Raises as `unreadable` says; UserError or RestartError if the working folder cannot be written.
        """
        if self._run.url is None:
            return
        try:
            contents = self._read(self._run.url)
        except OSError as error:
            raise unreadable(str(self._run), error) from error
        what = f"working folder {self._run.path}"
        insist(lambda: self._replace(contents), what, instead=f"folder with {WORKING_FOLDERS}")

    def upload(self) -> None:
        """Uploads the records that have changed since the last call. Raises OSError, and as `check_owner`.

        Of a file of lines, half a line at its end, which is being written, is left out.
        """
        if self._run.url is None:
            return
        with self._lock:
            changed = {name: now for name, now in self._versions().items() if now != self._uploaded.get(name)}
            for name, version in changed.items():
                try:
                    content = (self._run.path / name).read_bytes()
                except FileNotFoundError:  # removed meanwhile
                    continue
                if name.endswith(".jsonl"):
                    content = content[: content.rfind(b"\n") + 1]
                self._check_owner()
                self._write(self._run.url, name, content)
                self._uploaded[name] = version

    def insist(self) -> None:
        """As `upload`, and tries again for a while. Raises RestartError if it fails for longer."""
        insist(self.upload, f"the records in {self._run}", remedy="check the store and your access to it")

    def _write(self, url: str, name: str, content: bytes) -> None:
        store, folder = open_store(url, patience=PROMPT_SECONDS)
        key = f"{folder}/{name}".lstrip("/")
        with store_failures(url):
            if len(content) <= _AT_ONCE:
                store.write(key, content)
            else:
                store.write_stream(key, (content[at : at + _AT_ONCE] for at in range(0, len(content), _AT_ONCE)))

    def _read(self, url: str) -> dict[str, bytes]:
        """The records in the store."""
        store, folder = open_store(url)
        start = len(folder) + 1 if folder else 0
        with store_failures(url):
            infos = [info for sub in _FOLDERS for info in store.list_folder(f"{folder}/{sub}".strip("/"))]
            names = {info.key[start:] for info in infos if not info.is_folder and _RECORD.fullmatch(info.key[start:])}
            return {name: store.read(f"{folder}/{name}".lstrip("/")) for name in sorted(names)}

    def _replace(self, contents: dict[str, bytes]) -> None:
        events = contents.get("events.jsonl")
        was_here = events is not None and _begins_with(self._run.events, events)  # when it was last run
        for name in self._versions():
            if name not in contents and not (was_here and _LOCAL.fullmatch(name)):
                (self._run.path / name).unlink()
        for name, content in contents.items():
            path = self._run.path / name
            if not (name in _LOGS and _begins_with(path, content)):
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, content)
            if path.stat().st_size == len(content):  # and not a longer log, which is uploaded next
                self._uploaded[name] = _version(path)

    def _versions(self) -> dict[str, _Version]:
        """The records in the working folder."""
        found = {}
        for folder in (*_FOLDERS, "stacks", "profile"):
            try:
                paths = sorted((self._run.path / folder).iterdir())
            except FileNotFoundError:
                continue
            for path in paths:
                name = path.relative_to(self._run.path).as_posix()
                if _RECORD.fullmatch(name) or _LOCAL.fullmatch(name):
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        found[name] = _version(path)
        return found


@contextlib.contextmanager
def kept_records(run: RunFolder, owner: Ownership) -> Iterator[Records]:
    """The records of a run that is owned: fetched if this process took the run over, and uploaded at the end.

    Also if the block raises. That last upload may fail with a warning; `insist` before it if it must not.
    """
    records = Records(run, owner.check)
    if owner.is_new:
        records.fetch()
    try:
        yield records
    finally:
        with contextlib.suppress(UserError, RestartError):  # the run is another process's, or has no working folder
            try:
                records.upload()
            except OSError as error:
                warn(f"the last records of {run} could not be uploaded ({reason(error)}): they are in {run.path}")


def _begins_with(path: Path, content: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(content)) == content
    except FileNotFoundError:
        return False


def _version(path: Path) -> _Version:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size
