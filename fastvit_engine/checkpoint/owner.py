"""One run at a time: the owner records of a run folder and of the folder or store of its checkpoints.

A run folder in an object store has two: one there, and one in its working folder.

`owner-N.json` says which process owns the place. Taking over creates the record of the next number, which only one of
several processes can do, and then removes the older ones. So an owner that was suspended finds its own record gone,
and stops before it writes. The owner refreshes its record every `HEARTBEAT_SECONDS`; in a folder, the time of the
file is the heartbeat. An owner is gone if its process on this machine has ended, or if, on another machine, its
record does not change for `STALE_SECONDS`. It is watched for so long, however old it is: clocks need not agree.
Processes of one launch (`RUN_ID`) take over from each other at once: the launcher has ended the old ones before it
starts the new.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime

from fastvit_engine.checkpoint.local import LocalStore
from fastvit_engine.checkpoint.open import store_of
from fastvit_engine.checkpoint.remote import RemoteStore
from fastvit_engine.checkpoint.store import CheckpointStore
from fastvit_engine.config import CheckpointConfig
from fastvit_engine.errors import RestartError, UserError
from fastvit_engine.files import this_machine
from fastvit_engine.observe.disk import insist, unreadable
from fastvit_engine.observe.owner_record import (
    HEARTBEAT_SECONDS,
    STALE_SECONDS,
    Owner,
    newest_record,
    parse_owner,
    process_start,
    record_number,
)
from fastvit_engine.observe.run_folder import WORKING_FOLDERS, RunFolder
from fastvit_engine.shown import public_url
from fastvit_engine.shown import say as say_to_user

LAUNCHER = "FASTVIT_LAUNCHER"  # the process of a launcher whose ranks are not its children, but their server's
RUN_ID = "FASTVIT_RUN_ID"  # of one launch with all its restarts; a launcher gives it to each process
_LAST_HEARTBEAT_SECONDS = 30.0  # that one may take that has begun
_WATCH_SECONDS = 1.0  # between two looks at a record


class _RunFolderStore(LocalStore):
    """The run folder on this machine, for its owner record alone."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__(run.path)
        self.is_working_folder = run.url is not None
        working = "" if run.url is None else f" (working folder {run.path})"
        self.title = f"run folder {run}{working}"


class _RunUrlStore(RemoteStore):
    """The run folder in an object store, for its owner record alone."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.title = f"run folder {public_url(url)}"


class Ownership:
    """The records that say so. Those with `token` are kept fresh; others are the parent process's, which does it.

    The first one is the run folder's on this machine. Processes that write nothing, all but rank 0, have none.
    """

    def __init__(self, records: Sequence[tuple[CheckpointStore, str, Owner]] = (), token: str = "") -> None:
        self._records = records
        self._own = [record for record in records if record[2].token == token]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="owner", daemon=True)
        if self._own:
            self._thread.start()

    @property
    def is_new(self) -> bool:
        """Whether this process took the run over, from nobody or from another process that was not its parent."""
        return bool(self._own)

    def check(self) -> None:
        """Raises UserError if this process has lost what it owned; OSError if the disk or the store cannot say.

        RestartError if only the working folder of a run in an object store is gone.
        """
        for record in self._records:
            _check(*record)

    def check_run_folder(self) -> None:
        """As `check`, without asking the store of the checkpoints, which may be far away."""
        for record in self._records[:1]:
            _check(*record)

    def confirm(self) -> None:
        """As `check`, and asks again if the disk or the store cannot say. Raises RestartError if it keeps failing."""
        insist(self.check, "the owner record")

    def release(self) -> None:
        """Gives up what is this process's own; others may take it at once."""
        self._stop.set()
        if self._own:
            self._thread.join(_LAST_HEARTBEAT_SECONDS)  # which could bring back the object that is removed now
        for store, name, _ in self._own:
            with contextlib.suppress(OSError):  # its process has ended soon, which says the same
                store.remove_owner(name)

    def _refresh(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            for store, name, owner in self._own:
                with contextlib.suppress(OSError):  # `check` finds out what it means
                    store.refresh_owner(name, owner.to_json())


def _check(store: CheckpointStore, name: str, owner: Owner) -> None:
    try:
        held = parse_owner(store.read_owner(name)[0])
        lost = held is None or held.token != owner.token or newest_record(store.owners()) != name
    except FileNotFoundError:
        lost = True
    if lost:
        raise _loss(store)


@contextlib.contextmanager
def own(
    settings: CheckpointConfig,
    run: RunFolder,
    environment: Mapping[str, str] = os.environ,
    say: Callable[[str], None] = say_to_user,
) -> Iterator[Ownership]:
    """Owns the run folder and the place of its checkpoints during the block.

    Raises UserError at once if a run that is alive owns one of them. A folder that is empty at the end disappears.
    """
    stores = _stores(settings, run)
    folders = [store.folder for store in stores[::-1] if isinstance(store, LocalStore)]
    made = [folder for path in folders for folder in (path, *path.parents) if not folder.exists()]
    try:
        run.prepare()
        ownership = claim(stores, environment, say)
        try:
            yield ownership
        finally:
            ownership.release()
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _stores(settings: CheckpointConfig, run: RunFolder) -> list[CheckpointStore]:
    """What a run owns: the run folder on this machine, the one in an object store, and the place of checkpoints."""
    in_bucket = [] if run.url is None else [_RunUrlStore(run.url)]
    return [_RunFolderStore(run), *in_bucket, store_of(settings, run)]


def check_unowned(settings: CheckpointConfig, run: RunFolder) -> tuple[str, ...]:
    """One sentence for each place of a run that another process may still own; writes nothing.

    Raises UserError if an owner is alive on this machine, and as `unreadable` says.
    """
    doubts: dict[str, None] = {}
    for store in _stores(settings, run):
        where, what = _where(store)
        try:
            newest = newest_record(store.owners())
            held = None if newest is None else parse_owner(store.read_owner(newest)[0])
        except FileNotFoundError:  # it has gone meanwhile
            continue
        except OSError as error:
            raise unreadable(where, error) from error
        if newest is None or (held is not None and held.has_ended):
            continue
        if held is not None and held.machine == this_machine():
            raise UserError(_refusal(where, what, held))
        who = "a process whose record is damaged" if held is None else f"{held}, since {held.since}"
        doubts[f"{where} belongs to {who}: a start waits up to {STALE_SECONDS:.0f} s to see whether that is alive"] = (
            None
        )
    return tuple(doubts)


def claim(stores: Sequence[CheckpointStore], environment: Mapping[str, str], say: Callable[[str], None]) -> Ownership:
    """Takes ownership of all stores, or of none."""
    owner = Owner(
        host=socket.gethostname(),
        machine=this_machine(),
        process=os.getpid(),
        process_started=process_start(os.getpid()),
        run_id=environment.get(RUN_ID) or uuid.uuid4().hex,
        token=uuid.uuid4().hex,
        since=datetime.now().astimezone().isoformat(timespec="seconds"),
        heartbeat=time.time(),
    )
    records: list[tuple[CheckpointStore, str, Owner]] = []
    gone: set[str] = set()  # the tokens of owners that need not be watched once more
    try:
        for store in stores:
            records.append((store, *_take(store, owner, gone, say)))
    except BaseException:
        for store, name, taken in records:
            if taken.token == owner.token:
                with contextlib.suppress(OSError):
                    store.remove_owner(name)
        raise
    return Ownership(records, owner.token)


def _take(store: CheckpointStore, owner: Owner, gone: set[str], say: Callable[[str], None]) -> tuple[str, Owner]:
    """Makes `owner` the owner, if nobody else is; returns the record that counts, which may be the parent process's."""
    where, what = _where(store)
    if isinstance(store, _RunFolderStore) and store.is_working_folder:
        where, what = f"working folder {store.folder}", f"folder with {WORKING_FOLDERS}"
    while (taken := insist(lambda: _try_to_take(store, owner, gone, say), where, instead=what)) is None:
        pass
    return taken


def _try_to_take(
    store: CheckpointStore, owner: Owner, gone: set[str], say: Callable[[str], None]
) -> tuple[str, Owner] | None:
    """As `_take`; None if another process was faster, or the record has gone meanwhile."""
    names = store.owners()
    newest = newest_record(names)
    if newest is not None:
        try:
            held = parse_owner(store.read_owner(newest)[0])
            if held is not None and _is_ours(held, owner):
                return newest, held
            if held is None or (held.run_id != owner.run_id and held.token not in gone):
                _wait_for_end(store, newest, say)
            if held is not None:
                gone.add(held.token)
        except FileNotFoundError:
            return None
    name = f"owner-{1 if newest is None else record_number(newest) + 1}.json"
    if not store.create_owner(name, owner.to_json()):
        return None
    for old in names:
        store.remove_owner(old)
    return name, owner


def _is_ours(held: Owner, owner: Owner) -> bool:
    """Whether a record is this process's own, or of the launcher that started it as a rank and waits for it."""
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))
    by_parent = held.machine == owner.machine and held.process == launcher and held.run_id == owner.run_id
    return held.token == owner.token or by_parent


def _wait_for_end(store: CheckpointStore, name: str, say: Callable[[str], None]) -> None:
    """Returns once the owner of a record is known to be gone. Raises UserError if it is alive."""
    where, what = _where(store)
    content, modified = store.read_owner(name)
    held = parse_owner(content)
    who = "a process whose record is damaged" if held is None else f"{held}"
    if held is None or held.machine != this_machine():
        say(f"{where} belongs to {who}: waiting up to {STALE_SECONDS:.0f} s to see whether that is alive")
        deadline = time.monotonic() + STALE_SECONDS
        while store.read_owner(name) == (content, modified):
            if time.monotonic() > deadline:
                break
            time.sleep(_WATCH_SECONDS)
        else:
            raise UserError(_refusal(where, what, held))
    elif not held.has_ended:
        raise UserError(_refusal(where, what, held))
    say(f"taking over {where}: {who} owned it and is gone")


def _refusal(where: str, what: str, held: Owner | None) -> str:
    if held is None:
        return f"{where} is in use by another run: wait until that has ended, or choose another {what}"
    return (
        f"{where} is in use by {held}, since {held.since}: wait until that run has ended, stop it (kill "
        f"{held.process} on {held.host}), or choose another {what}"
    )


def _loss(store: CheckpointStore) -> UserError | RestartError:
    where, what = _where(store)
    if isinstance(store, LocalStore) and not store.folder.exists():
        if isinstance(store, _RunFolderStore) and store.is_working_folder:
            return RestartError(
                f"{where} is gone, removed or unmounted: run the same command again with --resume auto, which fetches "
                "the records"
            )
        return UserError(
            f"{where} is gone, removed or unmounted: restore it, or choose another {what}, and start again"
        )
    by = "another run"
    with contextlib.suppress(OSError):
        newest = newest_record(store.owners())
        if newest is None:
            return UserError(
                f"{where} no longer belongs to this run: its owner record is gone, removed by hand or by another run "
                f"that has ended since; it stops and writes nothing more: start again, or choose another {what}"
            )
        held = parse_owner(store.read_owner(newest)[0])
        by = f"{held}, since {held.since}" if held else by
    return UserError(
        f"{where} no longer belongs to this run but to {by}: it stops and writes nothing more; choose another {what}"
    )


def _where(store: CheckpointStore) -> tuple[str, str]:
    """The name of a place for people, and what to choose another one of."""
    if isinstance(store, _RunFolderStore | _RunUrlStore):
        return store.title, "one with --out"
    return store.describe(""), "checkpoint.path"
