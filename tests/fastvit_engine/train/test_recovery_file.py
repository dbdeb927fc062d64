"""`recovery.json`: what a resume needs to know of earlier rewinds, which no log for people is read for."""

import json

import pytest

from fastvit_engine.checkpoint import Recovery
from fastvit_engine.errors import UserError
from fastvit_engine.observe.events import record_event
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.recovery import load_recovery, save_recovery

KNOWN = Recovery(skipped=((32, 64), (96, 128)), failed=((96, 128), (256, 288)), rewinds=2)


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


def test_what_is_saved_comes_back(run):
    save_recovery(run, KNOWN)
    assert load_recovery(run) == KNOWN
    assert [path.name for path in run.path.iterdir()] == ["recovery.json"]


def test_a_new_run_remembers_nothing(run):
    assert load_recovery(run) == Recovery()
    assert not run.path.exists()


def earlier_version(run):
    """What a run of an earlier version left: the same facts as KNOWN, among its events."""
    for number, window in enumerate([[96, 128], [256, 288]]):
        record_event(run, "anomaly", "the loss is nan", step=3, samples=window)
        if number == 0:
            record_event(run, "skip", "left out", step=3, samples=window)
        record_event(run, "rewind", "back", step=3, from_step=3, to_step=0)
    record_event(run, "skip", "doubtful labels", samples=[32, 64])  # by hand
    record_event(run, "checkpoint", "saved", step=4)


def test_the_events_of_a_run_of_an_earlier_version_are_read_once(run):
    earlier_version(run)
    assert load_recovery(run) == KNOWN
    save_recovery(run, load_recovery(run))  # as the first start does
    record_event(run, "skip", "not a decision of this version", samples=[512, 544])
    assert load_recovery(run) == KNOWN


@pytest.mark.parametrize(
    "tail", [b'{"time": "2026-', b'{"time": "2026-{"time": "x", "event": "start"}\n', b"\0\0\0", b"[" * 9999]
)
def test_damaged_lines_of_events_stop_no_start(run, tail):
    earlier_version(run)
    with open(run.events, "ab") as file:
        file.write(tail)
    assert load_recovery(run) == KNOWN
    save_recovery(run, KNOWN)
    assert load_recovery(run) == KNOWN


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"skipped": 3}', '{"skipped": [[3]]}', '{"skipped": [[9, 3]]}', '{"skipped": [["a", "b"]]}'],
)
def test_a_damaged_file_is_named_with_what_to_do(run, content):
    run.path.mkdir()
    run.recovery.write_text(content)
    with pytest.raises(UserError, match=r"recovery.json is damaged .*correct it, or remove it"):
        load_recovery(run)
    run.recovery.unlink()  # as the sentence says
    assert load_recovery(run) == Recovery()


def test_an_event_without_a_window_is_named(run):
    record_event(run, "skip", "by hand", samples=[64, 32])
    with pytest.raises(UserError, match="events.jsonl names samples that are no window"):
        load_recovery(run)


def test_the_file_is_plain_json_that_can_be_edited(run):
    save_recovery(run, KNOWN)
    content = json.loads(run.recovery.read_text())
    assert content == {"skipped": [[32, 64], [96, 128]], "failed": [[96, 128], [256, 288]], "rewinds": 2}
    content["skipped"].append([512, 544])
    run.recovery.write_text(json.dumps(content))
    assert load_recovery(run).skipped[-1] == (512, 544)
