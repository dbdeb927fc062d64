import json
import os
from dataclasses import replace

import pytest

from fastvit_engine.checkpoint import Manifest, Recovery, TrainerState
from fastvit_engine.checkpoint.local import LocalStore
from fastvit_engine.data.stream.indexed import IndexedData
from fastvit_engine.errors import RestartError, UserError
from fastvit_engine.observe import disk
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.health import rewind
from fastvit_engine.train.health.diagnosis import Diagnosis
from fastvit_engine.train.health.guard import Anomaly, StepReport
from fastvit_engine.train.health.rewind import Failure, go_back, record_anomaly
from fastvit_engine.train.recovery import load_recovery
from fastvit_engine.train.start import Start

DATA = IndexedData(train=(), eval=None, samples_per_epoch=100)
FINGERPRINT = {"model": {"name": "Ti/4"}}


@pytest.fixture
def run(tmp_path):
    """A run whose latest checkpoint is that of step 5, before which it has left out 64 samples."""
    recovery = Recovery(skipped=((32, 96),))
    state = TrainerState(5, FINGERPRINT, 2.0, consumed=224, bad_samples=1, recent=((2.0, 1.0),), recovery=recovery)
    run = RunFolder(tmp_path)
    store = LocalStore(run.checkpoints)
    store.prepare("step-00000005", 0)
    store.publish("step-00000005", Manifest(state, {}, {}, {}).to_json())
    store.point_latest("step-00000005")
    return run


def fail(run, window, *, skip=True, most=3, recovery=None, step=7, **facts):
    """A step of this window fails in a run that knows `recovery`, or else what its file says."""
    state = TrainerState(0, FINGERPRINT, recovery=load_recovery(run) if recovery is None else recovery)
    failure = Failure(step, window, Anomaly("loss", "the loss is nan"), StepReport(float("nan"), 1.0, 0.0, None))
    diagnosis = replace(Diagnosis("data", [1], ["node"], ["key"], [], True, not skip, False), **facts)
    message = record_anomaly(run, failure, diagnosis)
    start = Start(state, 100, None, "", DATA)
    return go_back(run, LocalStore(run.checkpoints), start, failure, message, diagnosis, max_rewinds=most)


def test_going_back_leaves_out_the_window_and_what_was_left_out_before(run):
    there = fail(run, (288, 320))
    state = there.state
    assert (there.step, state.consumed, state.seconds, state.bad_samples) == (5, 224, 2.0, 1)
    assert state.recovery == Recovery(skipped=((32, 96), (288, 320)), failed=((288, 320),), rewinds=1)
    assert state.recent == ((2.0, 1.0),)
    anomaly, skip, back = read_events(run)
    assert anomaly["message"] == "at step 8 on rank 1 (node), the loss is nan: data"
    assert (anomaly["loss"], anomaly["grad_norm"], anomaly["keys"]) == ("nan", 1.0, ["key"])
    assert skip["samples"] == [288, 320]
    assert (back["from_step"], back["to_step"], back["rewinds"]) == (7, 5, 1)


def test_the_decision_is_on_disk_before_anything_else_happens(run, monkeypatch):
    """Wherever the run is killed then, it leaves the window out and counts the rewind."""

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(rewind, "move_to_latest", killed)
    with pytest.raises(KeyboardInterrupt):
        fail(run, (288, 320))
    assert load_recovery(run) == Recovery(skipped=((288, 320),), failed=((288, 320),), rewinds=1)


def test_a_decision_that_cannot_be_written_is_not_acted_on(run, monkeypatch):
    def no_space(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    monkeypatch.setattr(disk, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(RestartError, match=r"recovery\.json could not be written .*No space left"):
        fail(run, (288, 320))
    assert load_recovery(run) == Recovery(failed=((288, 320),))  # from the event of the anomaly
    assert [event["event"] for event in read_events(run)] == ["anomaly"]


def test_a_run_gives_up_after_so_many_times(run):
    for number in range(3):
        fail(run, (320 * number, 320 * number + 32))
    with pytest.raises(UserError, match=r"on rank 1 \(node\), the loss is nan.*gone back 3 time.*health.max_rewinds"):
        fail(run, (960, 992))
    assert len(fail(run, (960, 992), most=4).state.recovery.skipped) == 5


def test_no_rewind_at_all_where_none_is_allowed(run):
    with pytest.raises(UserError, match="gone back 0 time"):
        fail(run, (0, 32), most=0)


def test_an_innocent_window_is_trained_on_again_but_may_not_fail_twice(run):
    assert fail(run, (288, 320), skip=False).state.recovery.skipped == ((32, 96),)
    with pytest.raises(UserError, match="same step has failed before"):
        fail(run, (288, 320), skip=False)


def test_what_made_a_run_give_up_is_remembered_by_the_next_start(run):
    with pytest.raises(UserError, match="gone back 0 time"):
        fail(run, (288, 320), skip=False, most=0)
    with pytest.raises(UserError, match="same step has failed before"):
        fail(run, (288, 320), skip=False, most=1)


def test_a_rewind_counts_what_only_the_manifest_remembers(run):
    """As in a new run folder over checkpoints in a store."""
    known = Recovery(skipped=((0, 32),), failed=((0, 32), (64, 96)), rewinds=2)
    assert fail(run, (288, 320), recovery=known).state.recovery.rewinds == 3
    assert json.loads(run.recovery.read_text())["failed"] == [[0, 32], [64, 96], [288, 320]]


@pytest.mark.parametrize(
    ("facts", "remedy"),
    [
        ({}, "repair or remove the samples that are named there, or lower optimizer.learning_rate"),
        ({"repeats": False}, "leave out node, or lower optimizer.learning_rate if the hardware is sound"),
        ({"skip": False, "repeats": None}, "leave out node, or lower optimizer.learning_rate if the hardware is sound"),
        (
            {"everywhere": True},
            "lower optimizer.learning_rate, lengthen schedule.warmup, or set a lower",
        ),
    ],
)
def test_what_to_do_follows_from_the_diagnosis(run, facts, remedy):
    with pytest.raises(UserError) as error:
        fail(run, (288, 320), most=0, **facts)
    assert f"see {run.events}, {remedy}" in str(error.value)
    assert str(error.value).endswith(
        ", and run the same command again with --resume auto and a higher health.max_rewinds"
    )


def test_what_fails_everywhere_before_the_first_update_is_the_configurations_at_once(run):
    with pytest.raises(UserError) as error:
        fail(run, (0, 32), step=0, everywhere=True)
    assert "no update has been made, so the configuration is at fault: correct data.mean, data.std" in str(error.value)
    assert "host" not in str(error.value) and "shard" not in str(error.value)
    assert load_recovery(run).rewinds == 0
    assert fail(run, (0, 32), step=0).state.recovery.rewinds == 1  # one sample may well be at fault
