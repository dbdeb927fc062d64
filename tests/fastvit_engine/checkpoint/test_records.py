"""Records of a run in an object store: what is uploaded when, and what a machine that takes the run over finds."""

import errno
import os
import shutil
import threading

import pytest

from fastvit_engine.checkpoint.export import _uploaded_from, find_checkpoint
from fastvit_engine.checkpoint.owner import RUN_ID, own
from fastvit_engine.checkpoint.records import Records, kept_records
from fastvit_engine.checkpoint.remote import RemoteStore
from fastvit_engine.config import CheckpointConfig
from fastvit_engine.errors import RestartError, UserError
from fastvit_engine.observe import disk
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.observe.owner_record import HEARTBEAT_SECONDS, STALE_SECONDS
from fastvit_engine.observe.report.recorded_run import load_run
from fastvit_engine.observe.run_folder import RunFolder, run_folder
from fastvit_engine.storage.source import AttemptFailed
from fastvit_engine.storage.stores import Store
from fastvit_engine.train.recovery import load_recovery

FILES = {
    "config.yaml": b"seed: 0\n",
    "configs/config-0001.yaml": b"seed: 0\n",
    "environment.json": b"{}",
    "metrics.jsonl": b'{"step": 1}\n{"step": 2}\n',
    "events.jsonl": b'{"event": "start"}\n',
    "bad_samples.jsonl": b'{"key": "a"}\n',
    "recovery.json": b"{}\n",
    "samples.json": b"[]",
    "classes.json": b"{}",
    "reconstructions.json": b"{}",
    "tensorboard/events.out.tfevents.1.node.2.0": bytes(99),
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("fastvit_engine.checkpoint.remote._SETTLE_SECONDS", 0.0)


@pytest.fixture
def url(s3_bucket, tmp_path):
    yield f"s3://bucket/{tmp_path.name}/run"
    s3_bucket.rm(f"bucket/{tmp_path.name}/")


@pytest.fixture
def here(tmp_path, url):
    return RunFolder(tmp_path / "here", url)


@pytest.fixture
def there(tmp_path, url):
    return RunFolder(tmp_path / "there", url)


def fill(run, files=FILES):
    for name, content in files.items():
        path = run.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def files(run):
    found = (path for path in run.path.rglob("*") if path.is_file() and not path.name.startswith("owner-"))
    return {path.relative_to(run.path).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def written(monkeypatch):
    """The names of the objects that are written from now on."""
    names, write = [], Store.write

    def noted(store, key, content, **options):
        write(store, key, content, **options)
        names.append(key.partition("/run/")[2])

    monkeypatch.setattr(Store, "write", noted)
    return names


def test_another_machine_gets_every_record_and_nothing_else(here, there, url, s3_bucket):
    fill(here, FILES | {"owner-1.json": b"x", "model.safetensors": b"x", ".config.yaml.a.1.b.tmp": b"x"})
    Records(here).upload()
    prefix = url.removeprefix("s3://")
    assert sorted(s3_bucket.find(prefix)) == sorted(f"{prefix}/{name}" for name in FILES)
    for other in ("notes.txt", "data/metrics.jsonl", "checkpoints/latest", "tensorboard/sub/events.out.x"):
        s3_bucket.pipe_file(f"{prefix}/{other}", b"x")
    Records(there).fetch()
    assert files(there) == FILES


def test_the_store_is_the_truth_for_who_takes_the_run_over(here, there):
    """What an earlier run of the same name, or this one before another machine continued it, has left is replaced."""
    fill(here)
    Records(here).upload()
    fill(there, FILES | {"metrics.jsonl": b'{"step": 1}\n{"step": 9}\n', "configs/config-0002.yaml": b"seed: 1\n"})
    fill(
        there,
        {"events.jsonl": b'{"event": "stop"}\n', "recovery.json": b'{"rewinds": 7}\n', "stacks/1-rank-0.txt": b"x"},
    )
    Records(there).fetch()
    assert files(there) == FILES


def test_events_that_a_killed_process_could_not_upload_stay_on_its_machine(here, written):
    fill(here)
    Records(here).upload()
    more = FILES["events.jsonl"] + b'{"event": "hang"}\n'
    fill(here, {"events.jsonl": more, "metrics.jsonl": FILES["metrics.jsonl"] + b'{"step": 3}\n'})
    records = Records(here)
    records.fetch()
    assert files(here) == FILES | {"events.jsonl": more}
    written.clear()
    records.upload()
    assert written == ["events.jsonl"]


def test_only_what_has_changed_is_uploaded_and_no_half_line(here, there, written):
    fill(here)
    records = Records(here)
    records.upload()
    records.upload()
    assert sorted(written) == sorted(FILES)
    fill(here, {"metrics.jsonl": b'{"step": 1}\n{"step": 2}\n{"st'})
    records.upload()
    assert written[len(FILES) :] == ["metrics.jsonl"]
    Records(there).fetch()
    assert files(there) == FILES


def test_stack_traces_that_could_not_be_uploaded_stay_where_the_run_was_last(here, there, written):
    """Of a hang, after which torchrun starts the ranks again: they are the only trace of its cause."""
    trace = {"stacks/7-rank-0.txt": b"Thread"}
    fill(here)
    Records(here).upload()
    fill(here, {"events.jsonl": FILES["events.jsonl"] + b'{"event": "hang"}\n', **trace})
    written.clear()
    records = Records(here)
    records.fetch()
    records.upload()
    assert sorted(written) == ["events.jsonl", *trace]
    fill(there, {"events.jsonl": b'{"event": "of another run"}\n', **trace})
    Records(there).fetch()
    assert trace.keys().isdisjoint(files(there))


def test_a_record_that_is_removed_while_others_are_uploaded_keeps_none_back(here, written):
    fill(here)
    Records(here, lambda: (here.path / "samples.json").unlink(missing_ok=True)).upload()
    assert sorted(written) == sorted(FILES.keys() - {"samples.json"})


def test_the_owner_is_asked_before_each_write(here, written):
    """A process that was suspended in the middle of an upload does not overwrite what another has written since."""
    fill(here)
    answers = [None, None, UserError("it belongs to another run")]

    def check():
        if (answer := answers.pop(0)) is not None:
            raise answer

    with pytest.raises(UserError, match="belongs to another"):
        Records(here, check).upload()
    assert len(written) == 2


def test_a_write_ends_before_another_machine_may_have_taken_over(here, monkeypatch):
    """Of a machine without a network for a while, whose attempts go on."""
    patience = []

    def noted(store, key, content, **options):
        patience.append(store.config.patience + store.config.timeout)

    monkeypatch.setattr(Store, "write", noted)
    fill(here)
    Records(here).upload()
    remote = RemoteStore(here.checkpoint_location)
    remote.publish("step-00000001", b"{}")
    remote.point_latest("step-00000001")
    assert len(patience) == len(FILES) + 2 and max(patience) < STALE_SECONDS - HEARTBEAT_SECONDS


def test_a_large_record_is_uploaded_in_parts(here, there, monkeypatch):
    monkeypatch.setattr("fastvit_engine.checkpoint.records._AT_ONCE", 10)
    fill(here)
    Records(here).upload()
    Records(there).fetch()
    assert files(there) == FILES


def test_a_working_folder_that_cannot_be_written_is_named_with_its_variable(here, there, monkeypatch):
    fill(here)
    Records(here).upload()

    def refuse(path, content):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fastvit_engine.checkpoint.records.atomic_write", refuse)
    monkeypatch.setattr(disk, "PATIENCE_SECONDS", 0.0)
    number = errno.ENOSPC
    with pytest.raises(RestartError, match=f"^working folder {there.path} could not be written .*No space left"):
        Records(there).fetch()
    number = errno.EACCES
    with pytest.raises(UserError, match=f"^working folder {there.path} cannot be .*another folder with FASTVIT_"):
        Records(there).fetch()


def test_a_working_folder_that_vanishes_is_a_restart_and_not_the_end_of_the_run(here):
    """The same command finds everything in the store."""
    with own(CheckpointConfig(), here) as owner, kept_records(here, owner):
        fill(here)
        shutil.rmtree(here.path)
        with pytest.raises(RestartError, match=rf"working folder {here.path}\) is gone.*again with --resume auto"):
            owner.check()
        assert not here.path.exists()


def test_a_run_whose_objects_are_removed_says_that_and_names_no_other_run(here, s3_bucket):
    with own(CheckpointConfig(), here) as owner:
        owner._stop.set()
        owner._thread.join()  # a heartbeat that has looked already would bring the object back
        s3_bucket.rm(here.url.removeprefix("s3://"))
        with pytest.raises(UserError, match=f"run folder {here.url} no longer belongs to this run: its owner record"):
            owner.check()


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        ({"recovery.json": b""}, "URL/recovery.json is damaged .*made again from URL/events.jsonl"),
        ({"recovery.json": bytes(99)}, "URL/recovery.json is damaged"),
        ({"config.yaml": bytes(99)}, "URL/config.yaml is empty or damaged: restore it"),
        ({"environment.json": b'{"versions'}, "URL/environment.json is not valid JSON"),
    ],
)
def test_damage_in_the_store_is_named_where_it_can_be_mended(here, there, url, damage, what):
    """Not in the working folder, which the next start fetches again."""
    fill(here, FILES | damage)
    Records(here).upload()
    Records(there).fetch()
    with pytest.raises(UserError, match="^" + what.replace("URL", url)):
        if "config.yaml" in damage:
            find_checkpoint(url)
        elif "recovery.json" in damage:
            load_recovery(there)
        else:
            load_run(there)


def test_damaged_lines_in_the_store_are_counted_under_its_name(here, there, url, capsys):
    events = b'{"event": "sta\n' + FILES["events.jsonl"]
    fill(here, FILES | {"metrics.jsonl": bytes(9) + b"\n" + FILES["metrics.jsonl"], "events.jsonl": events})
    Records(here).upload()
    Records(there).fetch()
    read_events(there)
    read_metrics(there.metrics, there.describe(there.metrics))
    errors = capsys.readouterr().err
    assert f"fastvit: {url}/events.jsonl line 1 is not JSON" in errors
    assert f"fastvit: {url}/metrics.jsonl line 1 is not JSON" in errors and str(there.path) not in errors


@pytest.mark.parametrize("content", [b"", bytes(8), bytes(99), b"\x08\0", b"\xff" * 8, b"\x05" + bytes(7) + b"{}"])
def test_exported_weights_that_are_damaged_in_the_store_are_of_no_checkpoint(url, s3_bucket, content):
    s3_bucket.pipe_file(f"{url.removeprefix('s3://')}/model.safetensors", content)
    assert _uploaded_from(url, "model.safetensors") is None


@pytest.mark.parametrize("name", ["nobody/run", "bucket/a//b", "bucket/a/../b"])
def test_a_place_that_cannot_be_is_one_sentence(s3_bucket, tmp_path, monkeypatch, name):
    monkeypatch.setenv("FASTVIT_RUNS", str(tmp_path / "runs"))
    run = run_folder(f"s3://{name}")
    refused = pytest.raises(UserError, match=f"run folder s3://{name} cannot be .*choose another one with --out")
    with refused, own(CheckpointConfig(), run) as owner, kept_records(run, owner):
        pass
    assert not run.path.exists()


def test_stack_traces_are_uploaded_for_people(here, there, written):
    fill(here, {"stacks/7-rank-0.txt": b"Thread", "stacks/request": b"7"})
    Records(here).upload()
    assert written == ["stacks/7-rank-0.txt"]
    Records(there).fetch()
    assert files(there) == {}


def test_a_process_that_has_lost_the_run_uploads_nothing(here, written):
    fill(here)

    def lost():
        raise UserError("it belongs to another run")

    with pytest.raises(UserError, match="belongs to another"):
        Records(here, lost).upload()
    assert written == []


def test_a_store_that_does_not_answer_is_an_error_of_the_disk_and_asked_again(here, there, monkeypatch):
    fill(here)
    records, write, left = Records(here), Store.write, [1, 1]

    def no_answer(store, key, content, **options):
        if left:
            left.pop()
            raise AttemptFailed("no answer")
        write(store, key, content, **options)

    monkeypatch.setattr(Store, "write", no_answer)
    with pytest.raises(OSError, match="no answer"):
        records.upload()
    records.insist()
    Records(there).fetch()
    assert files(there) == FILES
    fill(here, {"recovery.json": b"{ }\n"})
    monkeypatch.setattr(disk, "PATIENCE_SECONDS", 0.0)
    left.append(1)
    with pytest.raises(RestartError, match=r"the records in s3://bucket/.*could not be written for 0 s \(.*no answer"):
        records.insist()


def test_a_run_folder_on_this_machine_has_nothing_to_upload(tmp_path):
    run = RunFolder(tmp_path / "run")
    fill(run)
    records = Records(run)
    records.fetch()
    records.upload()
    assert files(run) == FILES


def test_the_process_that_takes_the_run_over_fetches_and_its_ranks_do_not(here, there):
    """A launcher fetches once; when it starts its ranks again, what they have written since is newer than the store."""
    launch = {RUN_ID: "launch"}
    with own(CheckpointConfig(), here, launch) as owner, kept_records(here, owner):
        fill(here)
    with own(CheckpointConfig(), there, launch) as owner, kept_records(there, owner):
        assert files(there) == FILES
        fill(there, {"metrics.jsonl": b'{"step": 1}\n'})
        with own(CheckpointConfig(), there, launch) as again, kept_records(there, again):
            assert (again.is_new, files(there)["metrics.jsonl"]) == (True, FILES["metrics.jsonl"])


def test_the_last_records_are_uploaded_after_an_error_too(here, there):
    failing = pytest.raises(ValueError, match="a bug")
    with failing, own(CheckpointConfig(), here) as owner, kept_records(here, owner):
        fill(here)
        raise ValueError("a bug")
    Records(there).fetch()
    assert files(there) == FILES


def test_a_run_in_a_store_has_one_owner_whatever_machine_and_checkpoint_path(here, there, tmp_path):
    elsewhere = CheckpointConfig(path=str(tmp_path / "checkpoints"))
    with own(CheckpointConfig(), here) as owner:
        owner.check()
        refused = pytest.raises(UserError, match=rf"run folder {here.url} is in use by process \d+ on .*--out")
        with refused, own(elsewhere, there):
            pass
        assert not there.path.exists()
        refused = pytest.raises(UserError, match=rf"run folder {here.url} \(working folder {here.path}\) is in use")
        with refused, own(elsewhere, here):
            pass


def test_threads_may_upload_at_once(here, there):
    fill(here)
    records = Records(here)
    threads = [threading.Thread(target=records.upload) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    Records(there).fetch()
    assert files(there) == FILES
