"""One run at a time: who may write to a run folder and to checkpoint.path, and who finds out that he may not."""

import errno
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest

from fastvit_engine.checkpoint import local, open_store, owner
from fastvit_engine.checkpoint.local import LocalStore
from fastvit_engine.checkpoint.owner import RUN_ID, own
from fastvit_engine.config import CheckpointConfig
from fastvit_engine.errors import UserError
from fastvit_engine.files import this_machine
from fastvit_engine.observe.owner_record import Holder, Owner, holder_of, process_start
from fastvit_engine.observe.run_folder import RunFolder, run_folder

HERE = CheckpointConfig()


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "runs" / "a")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(owner, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(owner, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(owner, "_WATCH_SECONDS", 0.05)
    monkeypatch.setattr("fastvit_engine.checkpoint.remote._SETTLE_SECONDS", 0.05)


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    """checkpoint.path, away from the run folder."""
    if request.param == "folder":
        yield str(tmp_path / "checkpoints")
        return
    bucket = request.getfixturevalue("s3_bucket")
    yield f"s3://bucket/{tmp_path.name}"
    bucket.rm(f"bucket/{tmp_path.name}/")


def records(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def write_record(folder, number=1, age=0.0, **facts):
    """A record as another process would have left it; returns it."""
    facts = {"host": "node-7", "machine": "elsewhere", "process": 4321, "process_started": "17"} | facts
    held = Owner(**{"run_id": "other", "token": "t", "since": "2026-05-01T10:00:00+02:00", "heartbeat": 0.0} | facts)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"owner-{number}.json"
    path.write_text(json.dumps(asdict(held) | {"heartbeat": time.time() - age}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    started = process_start(process.pid)
    process.wait()
    return {"machine": this_machine(), "process": process.pid, "process_started": started}


def test_the_second_start_is_refused_at_once_and_the_next_one_after_the_end_is_not(run):
    with own(HERE, run) as first:
        assert records(run.path) == ["owner-1.json"]
        started = time.monotonic()
        with pytest.raises(UserError) as refusal, own(HERE, run):
            pass
        assert time.monotonic() - started < 0.5
        first.check()
    where = f"run folder {run.path} is in use by process {os.getpid()} on {socket.gethostname()}, since 20"
    assert str(refusal.value).startswith(where)
    for advice in ("wait until that run has ended", f"stop it (kill {os.getpid()} on ", "another one with --out"):
        assert advice in str(refusal.value)
    assert not run.path.parent.exists()  # nothing was written there
    with own(HERE, run):
        pass


def test_a_checkpoint_path_has_one_owner_too_whatever_the_run_folder(run, tmp_path, place):
    settings = CheckpointConfig(path=place)
    with own(settings, run) as first:
        refused = pytest.raises(UserError, match=r"is in use by process .* or choose another checkpoint\.path")
        with refused, own(settings, RunFolder(tmp_path / "b")):
            pass
        assert not (tmp_path / "b").exists()
        time.sleep(0.3)  # heartbeats
        first.check()
        assert open_store(place).names() == []
    assert open_store(place).owners() == []
    with own(settings, RunFolder(tmp_path / "b")) as second:
        second.check()


def test_another_run_may_not_keep_its_checkpoints_among_those_of_a_run_folder(run, tmp_path):
    other = RunFolder(tmp_path / "b")
    with own(HERE, run) as first:
        refused = pytest.raises(UserError, match=r"checkpoints/? is in use by process .* another checkpoint\.path")
        with refused, own(CheckpointConfig(path=str(run.checkpoints)), other):
            pass
        assert not other.path.exists()
        first.check()
    refused = pytest.raises(UserError, match="is in use by process")
    with own(CheckpointConfig(path=str(run.checkpoints)), other), refused, own(HERE, run):
        pass
    assert not run.path.exists() and not other.path.exists()


def test_a_run_may_keep_its_checkpoints_in_the_run_folder_itself(run):
    with own(CheckpointConfig(path=str(run.path)), run) as owned:
        assert records(run.path) == ["owner-1.json"]
        owned.check()
    assert not run.path.exists()


@pytest.mark.parametrize("kind", ["file", "dangling link", "below a file", "bucket"])
def test_a_place_that_cannot_be_is_refused_at_once(run, tmp_path, kind, request):
    place = tmp_path / "place"
    if kind == "dangling link":
        place.symlink_to(tmp_path / "nowhere" / "at all")
    elif kind == "bucket":
        request.getfixturevalue("s3_bucket")
        place = "s3://no-such-bucket/run"
    else:
        place.touch()
    settings = CheckpointConfig(path=f"{place}/below" if kind == "below a file" else str(place))
    started = time.monotonic()
    with (
        pytest.raises(UserError, match=r"cannot be written \(.+\): choose another checkpoint\.path"),
        own(settings, run),
    ):
        pass
    assert time.monotonic() - started < 20 and not run.path.exists()


def test_of_many_starts_in_the_same_moment_one_succeeds(run, place):
    """Also over the record of an owner that is gone."""
    settings = CheckpointConfig(path=place)
    write_record(run.path, **ended_process())
    together, over = threading.Barrier(8), threading.Event()
    outcomes = []

    def start():
        together.wait()
        try:
            with own(settings, run, say=lambda text: None) as owned:
                outcomes.append(owned)
                over.wait(30)
                owned.check()
        except UserError as refusal:
            outcomes.append(refusal)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(outcomes) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    over.set()
    for thread in threads:
        thread.join()
    assert sum(isinstance(outcome, UserError) for outcome in outcomes) == 7 and len(outcomes) == 8


def test_a_killed_owner_on_this_machine_is_taken_over_at_once_and_that_is_said(run):
    write_record(run.path, number=3, host="here", **(gone := ended_process()))
    said = []
    with own(HERE, run, say=said.append) as owned:
        assert records(run.path) == ["owner-4.json"]
        owned.check()
    assert said == [f"taking over run folder {run.path}: process {gone['process']} on here owned it and is gone"]


def test_a_process_that_got_the_number_of_a_killed_one_is_no_owner(run):
    write_record(run.path, machine=this_machine(), process=os.getpid(), process_started="1")
    with own(HERE, run, say=lambda text: None):
        pass


def _own_until_killed(path, ready):
    with own(HERE, RunFolder(path)):
        ready.set()
        time.sleep(600)


def test_the_advice_of_the_refusal_helps(run):
    """Stopping the process that it names."""
    forks = multiprocessing.get_context("fork")
    ready = forks.Event()
    other = forks.Process(target=_own_until_killed, args=[run.path, ready])
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(UserError, match=rf"kill {other.pid} on "), own(HERE, run):
            pass
        other.kill()
        while process_start(other.pid) != "ended":  # not waited for, as in a container without an init process
            time.sleep(0.01)
        with own(HERE, run, say=lambda text: None) as owned:
            owned.check()
    finally:
        other.kill()
        other.join()


def test_an_owner_on_another_machine_is_alive_as_long_as_its_record_changes(run):
    record = write_record(run.path)
    stop = threading.Event()

    def beat():
        while not stop.wait(0.2):
            os.utime(record)

    thread = threading.Thread(target=beat)
    thread.start()
    said = []
    try:
        refused = pytest.raises(UserError, match="in use by process 4321 on node-7, since 2026-05-01")
        with refused, own(HERE, run, say=said.append):
            pass
    finally:
        stop.set()
        thread.join()
    assert said == [
        f"run folder {run.path} belongs to process 4321 on node-7: waiting up to 1 s to see whether that is alive"
    ]


def test_who_works_on_a_run_is_told_without_waiting_and_without_writing(run):
    assert holder_of(run) is None  # nor is there a folder
    with own(HERE, run):
        assert holder_of(run) == Holder(f"process {os.getpid()} on {socket.gethostname()}")
    assert holder_of(run) is None
    path = write_record(run.path, **ended_process())
    assert holder_of(run) is None and path.exists()
    path.unlink()
    write_record(run.path, age=0.1)
    assert holder_of(run) == Holder("process 4321 on node-7")
    who, silence = holder_of(RunFolder(write_record(run.path, age=300.0).parent))
    assert who == "process 4321 on node-7" and silence == pytest.approx(300, abs=30)
    (run.path / "owner-1.json").write_text("{")
    assert holder_of(run) == Holder("a process whose record is damaged")


def test_who_works_on_a_run_in_a_store_is_told_by_its_record_there(tmp_path, s3_bucket, monkeypatch):
    monkeypatch.setenv("FASTVIT_RUNS", str(tmp_path / "working"))
    run = run_folder(f"s3://bucket/{tmp_path.name}")
    assert holder_of(run) is None
    with own(HERE, run):
        assert holder_of(run) == Holder(f"process {os.getpid()} on {socket.gethostname()}")
    assert holder_of(run) is None


def test_an_owner_keeps_all_its_records_fresh(run, place):
    """Another machine sees that it is alive: neither record stays as it is, even if nothing is written."""
    stores = [LocalStore(run.path), open_store(place)]
    with own(CheckpointConfig(path=place), run) as owned:
        seen = [{store.read_owner("owner-1.json")} for store in stores]
        deadline = time.monotonic() + 30
        while min(map(len, seen)) < 4:  # the first, and three heartbeats
            assert time.monotonic() < deadline, [len(contents) for contents in seen]
            time.sleep(0.02)
            for store, contents in zip(stores, seen, strict=True):
                contents.add(store.read_owner("owner-1.json"))
        owned.check()


@pytest.mark.parametrize("age", [0, -3600, 50 * 365 * 86400])
def test_an_owner_on_another_machine_without_a_heartbeat_is_taken_over(run, age):
    """Clocks need not agree: the record is watched, whatever its age."""
    write_record(run.path, age=age)
    started = time.monotonic()
    with own(HERE, run, say=lambda text: None) as owned:
        assert time.monotonic() - started > 0.9
        owned.check()


def test_an_owner_in_a_store_whose_clock_is_wrong_is_alive_as_long_as_its_record_changes(run, tmp_path, place):
    """A host without a clock of its own starts in 1970."""
    settings, store = CheckpointConfig(path=place), open_store(place)
    held = {"host": "node-7", "machine": "elsewhere", "process": 4321, "process_started": "17", "run_id": "other"}
    held |= {"token": "t", "since": "1970-01-01T00:00:00+00:00"}
    beats = iter(range(10**6))

    def content():
        return json.dumps(held | {"heartbeat": next(beats)}).encode()

    assert store.create_owner("owner-1.json", content())
    stop = threading.Event()

    def beat():
        while not stop.wait(0.2):
            store.refresh_owner("owner-1.json", content())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process 4321 on node-7"), own(settings, run, say=lambda _: None):
            pass
    finally:
        stop.set()
        thread.join()
    assert not run.path.exists()
    with own(settings, run, say=lambda _: None) as owned:  # it beats no more
        owned.check()


@pytest.mark.parametrize("content", [b"", b"\0" * 300, b'{"host": "x"}', b"[" * 10**5])
def test_a_damaged_record_is_watched_like_one_of_another_machine(run, content):
    write_record(run.path).write_bytes(content)
    with own(HERE, run, say=lambda text: None) as owned:
        owned.check()
        assert records(run.path) == ["owner-2.json"]


def test_a_restart_of_the_same_launch_takes_over_at_once_from_any_host(run, place):
    """The launcher has ended the old processes; if it could not reach one, that one finds its record gone."""
    settings, launch = CheckpointConfig(path=place), {RUN_ID: "job-17"}
    started = time.monotonic()
    with own(settings, run, launch) as old, own(settings, run, launch, say=lambda text: None) as new:
        assert time.monotonic() - started < 5
        new.check()
        with pytest.raises(UserError, match="no longer belongs to this run but to process"):
            old.check()
        time.sleep(0.3)  # and its heartbeats do not bring it back
        new.check()
        with pytest.raises(UserError, match="no longer belongs to this run"):
            old.check()


def _adopt(path, environment, outcome):
    with own(HERE, RunFolder(path), environment) as owned:
        owned.check()
    outcome.put(records(path))


def test_ranks_share_the_record_of_the_process_that_started_them(run):
    launch = {RUN_ID: "launch"}
    forks = multiprocessing.get_context("fork")
    with own(HERE, run, launch) as parent:
        for _ in range(2):  # one start and one restart
            outcome = forks.Queue()
            rank = forks.Process(target=_adopt, args=[run.path, launch, outcome])
            rank.start()
            assert outcome.get(timeout=30) == ["owner-1.json"]
            rank.join()
            parent.check()
    assert not run.path.exists()


def test_an_owner_that_was_suspended_finds_out(run):
    with own(HERE, run) as suspended:
        write_record(run.path, number=2)
        with pytest.raises(UserError, match="no longer belongs to this run but to process 4321 on node-7"):
            suspended.check()
        (run.path / "owner-1.json").unlink()
        (run.path / "owner-2.json").unlink()  # the other one has finished meanwhile
        with pytest.raises(UserError, match="no longer belongs to this run: its owner record is gone"):
            suspended.check()
        time.sleep(0.3)
        assert records(run.path) == []


def test_a_store_that_does_not_answer_is_asked_before_a_save_and_not_before_a_row(run, place, monkeypatch):
    settings = CheckpointConfig(path=place)
    with own(settings, run) as owned:
        answer, left = type(open_store(place)).read_owner, [OSError(errno.ETIMEDOUT, "Connection timed out")] * 3

        def no_answer(store, name):
            if left and store.describe("") == open_store(place).describe(""):
                raise left.pop()
            return answer(store, name)

        monkeypatch.setattr(type(open_store(place)), "read_owner", no_answer)
        owned.check_run_folder()
        with pytest.raises(OSError, match="timed out"):
            owned.check()
        owned.confirm()  # asks again until it answers
        assert not left
        owned._stop.set()
        owned._thread.join()  # a heartbeat that has looked already would bring the object back
        open_store(place).remove_owner("owner-1.json")
        owned.check_run_folder()
        with pytest.raises(UserError, match="no longer belongs to this run"):
            owned.confirm()


def test_a_run_folder_that_vanishes_is_one_sentence(run):
    with own(HERE, run) as owned:
        shutil.rmtree(run.path)
        with pytest.raises(UserError, match=f"run folder {run.path} is gone, removed or unmounted: restore it"):
            owned.check()
        time.sleep(0.3)
        assert not run.path.exists()


@pytest.mark.parametrize("name", ["owner-.json", "owner-x.json", "owner-1.json.tmp", "owners.json"])
def test_other_files_are_no_records(run, name):
    run.path.mkdir(parents=True)
    (run.path / name).touch()
    with own(HERE, run):
        assert "owner-1.json" in records(run.path)


def test_a_folder_that_a_refused_start_removes_is_made_again(tmp_path, monkeypatch):
    """A start that is refused removes the empty folders it made, perhaps just before the winner writes there."""
    store, create, removals = LocalStore(tmp_path / "checkpoints"), local.atomic_create, [3]

    def removed_before(path, content):
        if removals[0]:
            removals[0] -= 1
            path.parent.rmdir()
        return create(path, content)

    monkeypatch.setattr(local, "atomic_create", removed_before)
    assert store.create_owner("owner-1.json", b"{}") and store.owners() == ["owner-1.json"]
    removals[0] = 1000
    with pytest.raises(FileNotFoundError):
        LocalStore(tmp_path / "others").create_owner("owner-1.json", b"{}")
