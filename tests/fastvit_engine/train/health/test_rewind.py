import pytest

from fastvit_engine.checkpoint import Manifest
from fastvit_engine.checkpoint.local import LocalPlace
from fastvit_engine.data.stream.indexed import IndexedData
from fastvit_engine.errors import UserError
from fastvit_engine.observe.events import read_events, record_event
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train.health.diagnosis import Diagnosis
from fastvit_engine.train.health.guard import Anomaly, StepReport
from fastvit_engine.train.health.rewind import go_back, record_anomaly
from fastvit_engine.train.start import Start, move_to_latest

DATA = IndexedData(train=(), eval=None, samples_per_epoch=100)
START = Start(0, 100, 0.0, None, {}, "", DATA)


@pytest.fixture
def run(tmp_path):
    """A run whose latest checkpoint is that of step 5, before which it has left out 64 samples."""
    state = {"step": 5, "seconds": 2.0, "consumed": 224, "bad_samples": 1, "skipped": [[32, 96]]}
    state |= {"recent": [[2.0, 1.0]], "fingerprint": {}}
    run = RunFolder(tmp_path)
    place = LocalPlace(run.checkpoints)
    place.prepare("step-00000005", 0)
    place.publish("step-00000005", Manifest(5, state, {}, {}, {}).to_json())
    return run


def fail(run, window, *, skip=True, most=3):
    report = StepReport(float("nan"), 1.0, 0.0, None)
    diagnosis = Diagnosis("data", [1], ["node"], ["key"], [], True, not skip, False)
    message = record_anomaly(run, 7, window, Anomaly("loss", "the loss is nan"), report, diagnosis)
    return go_back(run, LocalPlace(run.checkpoints), START, 7, window, message, skip=skip, most=most)


def test_going_back_leaves_out_the_window_and_what_was_left_out_before(run):
    there = fail(run, (288, 320))
    assert (there.step, there.consumed, there.seconds, there.bad_samples) == (5, 224, 2.0, 1)
    assert there.skipped == ((32, 96), (288, 320))
    assert there.recent == ((2.0, 1.0),)
    anomaly, skip, rewind = read_events(run)
    assert anomaly["message"] == "at step 8 on rank 1 (node), the loss is nan: data"
    assert (anomaly["loss"], anomaly["grad_norm"], anomaly["keys"]) == ("nan", 1.0, ["key"])
    assert skip["samples"] == [288, 320]
    assert (rewind["from_step"], rewind["to_step"]) == (7, 5)


def test_a_run_killed_after_going_back_still_leaves_the_window_out(run):
    fail(run, (288, 320))
    assert move_to_latest(START, run, LocalPlace(run.checkpoints)).skipped == ((32, 96), (288, 320))


def test_a_run_gives_up_after_so_many_times(run):
    for number in range(3):
        fail(run, (320 * number, 320 * number + 32))
    with pytest.raises(UserError, match=r"on rank 1 \(node\), the loss is nan.*gone back 3 time.*health.max_rewinds"):
        fail(run, (960, 992))
    assert len(fail(run, (960, 992), most=4).skipped) == 5


def test_no_rewind_at_all_where_none_is_allowed(run):
    with pytest.raises(UserError, match="gone back 0 time"):
        fail(run, (0, 32), most=0)


def test_an_innocent_window_is_trained_on_again_but_may_not_fail_twice(run):
    assert fail(run, (288, 320), skip=False).skipped == ((32, 96),)
    with pytest.raises(UserError, match="same step has failed before"):
        fail(run, (288, 320), skip=False)


def test_a_window_can_be_left_out_by_hand(run):
    record_event(run, "skip", "doubtful labels", samples=[960, 992])
    assert move_to_latest(START, run, LocalPlace(run.checkpoints)).skipped == ((32, 96), (960, 992))
