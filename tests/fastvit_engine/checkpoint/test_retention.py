"""Which checkpoints are removed, for each of the three reasons to keep one."""

import pytest

from fastvit_engine.checkpoint.retention import stale_checkpoints
from fastvit_engine.checkpoint.trainer_state import TrainerState


def states(top1s=None, *, figure="top1", evaluated=True):
    """Checkpoints of steps 10, 20, ..., with these figures of their evaluations."""
    return {
        f"step-{step}": TrainerState(
            step=step,
            fingerprint={},
            accuracy={} if value is None else {"eval": {figure: value}},
            evaluated_at=step if evaluated else step - 1,
        )
        for step, value in zip(range(10, 1000, 10), top1s or [None] * 6, strict=False)
    }


def kept(found, **settings):
    stale = stale_checkpoints(found, **{"keep": 1, "keep_every": None, "best": None, **settings})
    return [found[name].step for name in found if name not in stale]


@pytest.mark.parametrize(("keep", "steps"), [(1, [60]), (2, [50, 60]), (9, [10, 20, 30, 40, 50, 60])])
def test_the_newest_stay_whatever_the_order_they_are_listed_in(keep, steps):
    found = states()
    assert kept(found, keep=keep) == steps
    backwards = dict(reversed(found.items()))
    assert sorted(kept(backwards, keep=keep)) == steps


def test_one_every_so_often_stays():
    assert kept(states(), keep_every=20) == [20, 40, 60]
    assert kept(states(), keep_every=25) == [30, 50, 60]  # the first at or after each multiple


def test_the_best_stays_and_of_equals_the_latest():
    assert kept(states([0.1, 0.9, 0.9, 0.9, 0.3, 0.2]), best="eval.top1") == [40, 60]
    assert kept(states([0.1, 0.9, 0.8, 0.7, 0.3, 0.2]), best="eval.top1") == [20, 60]
    assert kept(states([0.5, 0.4, 0.3, 0.2, 0.1, 0.9]), best="eval.top1") == [60]


def test_the_lowest_loss_is_the_best():
    assert kept(states([3.0, 1.0, 1.0, 2.0, 4.0, 5.0], figure="loss"), best="eval.loss") == [30, 60]


def test_a_figure_of_another_step_or_evaluation_does_not_count():
    assert kept(states([0.9, 0.1, 0.1, 0.1], evaluated=False), best="eval.top1") == [40]
    assert kept(states([0.9, 0.1, 0.1, 0.1]), best="eval_ema.top1") == [40]
    assert kept(states([0.1, None, 0.2, None]), best="eval.top1") == [30, 40]


def test_a_loss_that_is_no_number_is_not_the_best():
    nan = float("nan")
    assert kept(states([nan, 2.0, 1.0, 3.0, nan], figure="loss"), best="eval.loss") == [30, 50]
    assert kept(states([nan, nan, nan], figure="loss"), best="eval.loss") == [30]


def test_nothing_is_stale_twice_and_names_come_oldest_first():
    found = dict(reversed(states().items()))
    assert stale_checkpoints(found, keep=2, keep_every=None, best=None) == ["step-10", "step-20", "step-30", "step-40"]
