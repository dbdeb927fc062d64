import math

import pytest

from fastvit_engine.config import Config
from fastvit_engine.duration import BatchSizes
from fastvit_engine.errors import UserError
from fastvit_engine.train.schedule import Schedule, learning_rate_schedule


def schedule(total_steps=1_000, **section):
    config = Config.model_validate(
        {
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"warmup": "100 steps", **section},
            "train": {"global_batch_size": 10},
        }
    )
    return learning_rate_schedule(config, total_steps, samples_per_epoch=500)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "rsqrt"])
def test_warms_up_linearly_from_the_first_step(kind):
    rate = schedule(kind=kind, cooldown="0 steps")
    assert rate(0) == pytest.approx(1e-5)
    assert rate(49) == pytest.approx(5e-4)
    assert rate(99) == pytest.approx(1e-3)
    assert rate(100) == pytest.approx(1e-3)


def test_linear_falls_to_the_final_rate_after_the_last_step():
    rate = schedule(kind="linear", final_learning_rate=1e-5)
    assert rate(550) == pytest.approx((1e-3 + 1e-5) / 2)
    assert rate(1_000) == pytest.approx(1e-5)


def test_cosine_is_half_way_in_the_middle():
    rate = schedule(kind="cosine")
    assert rate(550) == pytest.approx(5e-4)
    assert rate(325) == pytest.approx(1e-3 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(1_000) == pytest.approx(0, abs=1e-12)


def test_rsqrt_decays_with_the_root_of_time_then_cools_down():
    rate = schedule(kind="rsqrt", timescale="100 steps", cooldown="200 steps")
    assert rate(400) == pytest.approx(1e-3 * math.sqrt(100 / 400))
    assert rate(800) == pytest.approx(1e-3 * math.sqrt(100 / 800))
    assert rate(900) == pytest.approx(1e-3 * math.sqrt(100 / 900) / 2)
    assert rate(1_000) == pytest.approx(0)


@pytest.mark.parametrize("warmup", ["100 steps", "2 epochs", "1000 samples", "10%"])
def test_warmup_in_any_unit_is_the_same(warmup):
    rate = schedule(kind="linear", warmup=warmup)
    assert [rate(step) for step in range(0, 1_000, 50)] == [
        schedule(kind="linear")(step) for step in range(0, 1_000, 50)
    ]


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="longer than the whole run of 50 steps"):
        schedule(total_steps=50)
    with pytest.raises(UserError, match="cooldown of 950"):
        schedule(kind="rsqrt", cooldown="950 steps")


def whole(**sections):
    train = {"global_batch_size": 10, "duration": "100 steps"}
    sections = {
        "train": train,
        "schedule": {"warmup": "0 steps"},
        "checkpoint": {"every": None},
        "data": {"eval": "shards"},
        **sections,
    }
    return Schedule(Config.model_validate(sections), samples_per_epoch=200)


def test_what_is_due_every_so_often_is_due_at_the_end_too():
    schedule = whole(evaluate={"every": "2 epochs"}, checkpoint={"every": "30 steps", "keep_every": "10%"})
    assert (schedule.total_steps, schedule.evaluate_every, schedule.save_every, schedule.keep_every) == (
        100,
        40,
        30,
        10,
    )
    assert [step for step in range(1, 101) if schedule.is_due(schedule.evaluate_every, step)] == [40, 80, 100]
    assert [step for step in range(1, 101) if schedule.is_due(0, step)] == [100]


def test_features_that_stay_the_same_are_measured_once():
    few_shot = {"fewshot": {"train": "a", "eval": "b", "every": "10 steps"}}
    assert whole(evaluate=few_shot).few_shot_every == 10
    assert whole(evaluate=few_shot, optimizer={"frozen": "backbone"}).few_shot_every == 0


@pytest.mark.parametrize(
    ("evaluate", "save", "covers"),
    [("10 steps", "30 steps", True), ("20 steps", "30 steps", False), (None, None, True)],
)
def test_whether_every_checkpoint_is_evaluated(evaluate, save, covers):
    schedule = whole(evaluate={"every": evaluate}, checkpoint={"every": save})
    assert schedule.evaluates_what_it_saves == covers


def test_an_interval_of_evaluations_does_not_matter_without_any():
    config = {"train": {"duration": "9 steps"}, "schedule": {"warmup": "0 steps"}, "evaluate": {"every": "5 epochs"}}
    assert Schedule(Config.model_validate(config), samples_per_epoch=None).evaluate_every == 0
    with pytest.raises(UserError, match=r"evaluate\.every = '5 epochs' is in epochs, .* set data\.train_samples"):
        Schedule(Config.model_validate({**config, "data": {"eval": "shards"}}), samples_per_epoch=None)


@pytest.mark.parametrize(
    ("key", "section"),
    [("train.duration", "train"), ("checkpoint.every", "checkpoint"), ("schedule.warmup", "schedule")],
)
def test_a_duration_that_cannot_be_converted_is_named(key, section):
    config = {"train": {"duration": "9 steps"}, "schedule": {"warmup": "0 steps"}, "checkpoint": {"every": None}}
    config[section] = {key.partition(".")[2]: "2 epochs"}
    with pytest.raises(UserError, match=rf"^{key} = '2 epochs' is in epochs"):
        Schedule(Config.model_validate(config), samples_per_epoch=None)


def test_a_run_of_less_than_a_step_is_refused():

    with pytest.raises(UserError, match="less than one step of the global batch"):
        whole(train={"global_batch_size": 10, "duration": "0 steps"})


# ---- the batch has changed

DOUBLED = BatchSizes.always(10).then(500, 20)


def changed(duration, batch_sizes=DOUBLED, **section):
    config = Config.model_validate(
        {
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"warmup": "100 steps", **section},
            "train": {"global_batch_size": batch_sizes.current, "duration": duration},
            "checkpoint": {"every": "1 epoch"},
        }
    )
    return Schedule(config, samples_per_epoch=500, batch_sizes=batch_sizes)


@pytest.mark.parametrize("duration", ["20 epochs", "10k samples"])
def test_a_length_in_epochs_or_samples_stays(duration):
    schedule = changed(duration)
    assert schedule.total_steps == 500 + 250
    assert (schedule.samples(500), schedule.samples(750)) == (5_000, 10_000)
    assert (schedule.epoch(500), schedule.epoch(625), schedule.epoch(750)) == (10, 15, 20)
    assert schedule.save_every == 25  # of the batch of today


def test_a_length_in_steps_stays():
    schedule = changed("1000 steps")
    assert schedule.total_steps == 1_000
    assert schedule.samples(1_000) == 5_000 + 10_000


@pytest.mark.parametrize("kind", ["linear", "cosine", "rsqrt"])
@pytest.mark.parametrize("duration", ["1000 steps", "20 epochs"])
@pytest.mark.parametrize("unit", [["100 steps", "300 steps", "200 steps"], ["1000 samples", "6 epochs", "20%"]])
def test_the_learning_rate_continues_where_it_was(kind, duration, unit):
    parts = dict(zip(("warmup", "timescale", "cooldown"), unit, strict=True))
    before = changed(duration, BatchSizes.always(10), kind=kind, **parts).learning_rate
    schedule = changed(duration, kind=kind, **parts)
    after = schedule.learning_rate
    assert [after(step) for step in range(501)] == pytest.approx([before(step) for step in range(501)])
    rates = [after(step) for step in range(500, schedule.total_steps)]
    assert rates == sorted(rates, reverse=True)
    assert after(schedule.total_steps) == pytest.approx(0, abs=1e-12)  # what it falls to


def test_in_samples_the_learning_rate_is_that_of_the_samples():
    before = changed("20 epochs", BatchSizes.always(10), kind="cosine").learning_rate
    after = changed("20 epochs", kind="cosine").learning_rate
    for step in range(0, 250, 10):  # after `step` of the larger steps, twice as many of the others
        assert after(500 + step) == pytest.approx(before(500 + 2 * step))


def test_a_warmup_in_samples_continues():
    sizes = BatchSizes.always(10).then(50, 20)
    rate = changed("20 epochs", sizes, warmup="1000 samples").learning_rate
    assert rate(49) == pytest.approx(5e-4)  # 500 of 1000 samples
    assert rate(50) == pytest.approx(5.2e-4)
    assert rate(74) == pytest.approx(1e-3)


def test_without_a_change_nothing_depends_on_how_it_is_written():
    """Equal to the bit: a run that was never changed keeps its learning rates."""
    for duration in ("1000 steps", "20 epochs"):
        for kind in ("linear", "cosine", "rsqrt"):
            one = changed(duration, BatchSizes.always(10), kind=kind, cooldown="100 steps")
            config = {"train": {"global_batch_size": 10, "duration": duration}, "optimizer": {"learning_rate": 1e-3}}
            config |= {"schedule": {"kind": kind, "warmup": "100 steps", "cooldown": "100 steps"}}
            plain = Schedule(Config.model_validate({**config, "checkpoint": {"every": None}}), samples_per_epoch=500)
            assert [one.learning_rate(s) for s in range(1_000)] == [plain.learning_rate(s) for s in range(1_000)]
