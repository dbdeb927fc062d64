"""Owner records, `owner-N.json`: which process works on a run. `checkpoint.owner` takes them and keeps them fresh."""

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from fastvit_engine.files import is_alive, this_machine
from fastvit_engine.observe.disk import unreadable
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.storage.stores import open_store, store_failures

HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 5 * HEARTBEAT_SECONDS


@dataclass(frozen=True)
class Owner:
    """The content of a record."""

    host: str
    machine: str  # since its start, and this container: within it, a process id has one meaning
    process: int
    process_started: str  # tells processes of the same id apart
    run_id: str
    token: str  # of this record alone
    since: str  # ISO 8601
    heartbeat: float  # seconds since 1970

    def to_json(self) -> bytes:
        return json.dumps(asdict(self) | {"heartbeat": time.time()}).encode()

    @property
    def has_ended(self) -> bool:
        """Whether it was a process of this machine, and is no more."""
        return self.machine == this_machine() and not (
            is_alive(self.process) and process_start(self.process) in ("", self.process_started)
        )

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


class Holder(NamedTuple):
    """A process that owns a run, as whoever reads the run folder sees it."""

    who: str  # "process 4321 on node-7"
    silent_seconds: float | None = None  # since its last heartbeat; None: it is alive


def holder_of(run: RunFolder) -> Holder | None:
    """The process that works on a run; None if nobody does: there is no owner record, or its process has ended.

    Writes nothing. A process on another machine counts as silent if its last heartbeat is older than `STALE_SECONDS` by
    the clock of this one. Raises as `unreadable` says.
    """
    try:
        found = _local_record(run.path) if run.url is None else _stored_record(run.url)
    except (FileNotFoundError, NotADirectoryError):  # there is no run, or the record has gone meanwhile
        return None
    except OSError as error:
        raise unreadable(f"run folder {run}", error) from error
    if found is None:
        return None
    content, modified = found
    held = parse_owner(content)
    if held is not None and held.machine == this_machine():
        return None if held.has_ended else Holder(str(held))
    beat = held.heartbeat if held is not None and modified is None else modified
    silence = 0.0 if beat is None else time.time() - beat
    who = "a process whose record is damaged" if held is None else str(held)
    return Holder(who, silence if silence > STALE_SECONDS else None)


def _local_record(folder: Path) -> tuple[bytes, float] | None:
    """The newest record in a folder, and the time of its last heartbeat."""
    newest = newest_record(list(filter(is_owner_name, os.listdir(folder))))
    if newest is None:
        return None
    with open(folder / newest, "rb") as opened:  # opening asks a file server for the newest state
        return opened.read(), os.fstat(opened.fileno()).st_mtime


def _stored_record(url: str) -> tuple[bytes, None] | None:
    """The newest record in an object store, whose content has the time of the heartbeat."""
    store, folder = open_store(url)
    with store_failures(url):
        names = [info.key.rpartition("/")[2] for info in store.list_folder(folder)]
        newest = newest_record(list(filter(is_owner_name, names)))
        return None if newest is None else (store.read(f"{folder}/{newest}".lstrip("/")), None)


def process_start(process: int) -> str:
    """When a process began, in units of the kernel; "" if that is unknown, "ended" for one that is only remembered."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]


def is_owner_name(name: str) -> bool:
    return re.fullmatch(r"owner-[0-9]{1,18}\.json", name) is not None


def newest_record(names: Sequence[str]) -> str | None:
    return max(names, key=record_number, default=None)


def record_number(name: str) -> int:
    return int(name.removeprefix("owner-").removesuffix(".json"))


def parse_owner(content: bytes) -> Owner | None:
    """None if the record is damaged."""
    try:
        owner = Owner(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None
    return owner if isinstance(owner.process, int) and isinstance(owner.heartbeat, int | float) else None
