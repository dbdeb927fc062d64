import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvit_engine.duration import EXAMPLES, SYNTAX, BatchSizes, parse_duration, to_steps
from fastvit_engine.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10000 steps", (10_000, "step")),
        ("10_000 steps", (10_000, "step")),
        ("1 step", (1, "step")),
        ("0.5 epochs", (0.5, "epoch")),
        ("300M samples", (300e6, "sample")),
        ("1.5B samples", (1.5e9, "sample")),
        ("10k steps", (10_000, "step")),
        ("5%", (5, "%")),
        ("5 percent", (5, "%")),
    ],
)
def test_parses_what_people_write(text, expected):
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_example_of_the_syntax_is_a_duration(text):
    assert text in SYNTAX
    assert parse_duration(text)[0] > 0


def test_the_letters_that_the_syntax_names_are_magnitudes():
    assert "k, M and B mean thousand, million and billion" in SYNTAX
    assert [parse_duration(f"2{letter} samples")[0] for letter in "kMB"] == [2e3, 2e6, 2e9]


@pytest.mark.parametrize("text", ["", "10", "ten epochs", "-5 steps", "5 weeks", "5 % epochs", "epochs"])
def test_refuses_anything_else(text):
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["9" * 400 + " epochs", "2_000_000B samples", "101%"])
def test_refuses_what_no_run_can_last(text):
    with pytest.raises(ValueError, match=r"^'.{1,40}' is too long: at most 1e\+15 steps, epochs or samples, or 100%$"):
        parse_duration(text)


def test_all_units_agree():
    sizes = {
        "key": "train.duration",
        "batch_sizes": BatchSizes.always(100),
        "samples_per_epoch": 5_000,
        "total_steps": 1_000,
    }
    assert to_steps("10 epochs", **sizes) == 500
    assert to_steps("50k samples", **sizes) == 500
    assert to_steps("50%", **sizes) == 500
    assert to_steps("500 steps", **sizes) == 500


def test_rounds_to_the_nearest_step():
    assert to_steps("1 epoch", key="train.duration", batch_sizes=BatchSizes.always(64), samples_per_epoch=1437) == 22
    assert to_steps("1 epoch", key="train.duration", batch_sizes=BatchSizes.always(64), samples_per_epoch=1441) == 23


def test_epochs_need_a_sample_count_and_a_share_needs_a_run():
    with pytest.raises(UserError, match=r"evaluate\.every = '3 epochs' is in epochs, .*data\.train_samples"):
        to_steps("3 epochs", key="evaluate.every", batch_sizes=BatchSizes.always(10), samples_per_epoch=None)
    with pytest.raises(UserError, match="cannot be the length of the run itself"):
        to_steps("5%", key="train.duration", batch_sizes=BatchSizes.always(10), samples_per_epoch=10)


def test_samples_and_steps_of_a_batch_that_changed():
    sizes = BatchSizes.always(32).then(10, 64).then(20, 8)
    assert sizes.changes == ((0, 32), (10, 64), (20, 8))
    assert [sizes.samples(step) for step in (0, 10, 11, 20, 25)] == [0, 320, 384, 960, 1000]
    assert [sizes.steps(samples) for samples in (0, 16, 320, 352, 960, 968)] == [0, 0.5, 10, 10.5, 20, 21]
    assert to_steps("1000 samples", key="train.duration", batch_sizes=sizes, samples_per_epoch=None) == 25
    assert to_steps("2 epochs", key="train.duration", batch_sizes=sizes, samples_per_epoch=500) == 25
    assert to_steps("30 steps", key="train.duration", batch_sizes=sizes, samples_per_epoch=500) == 30


def test_a_change_from_a_step_forgets_what_came_after_it():
    sizes = BatchSizes.always(32).then(10, 64)
    assert sizes.then(8, 64).changes == ((0, 32), (8, 64))  # gone back to an older checkpoint
    assert sizes.then(12, 64) == sizes
    assert sizes.then(12, 32).changes == ((0, 32), (10, 64), (12, 32))
    assert sizes.then(10, 32) == BatchSizes.always(32)
    assert sizes.then(0, 7) == BatchSizes.always(7)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 300)), min_size=1, max_size=5), st.integers(0, 400))
def test_steps_are_the_inverse_of_samples(spans, step):
    sizes, at = BatchSizes.always(spans[0][1]), 0
    for length, size in spans:
        sizes = sizes.then(at, size)
        at += length
    expected = sum(size for first in range(step) for size in [_size_at(sizes, first)])
    assert sizes.samples(step) == expected
    assert sizes.steps(sizes.samples(step)) == pytest.approx(step)


def _size_at(sizes, step):
    return [size for first, size in sizes.changes if first <= step][-1]
