import pytest

from fastvit_engine.duration import EXAMPLES, SYNTAX, parse_duration, to_steps
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
    sizes = {"key": "train.duration", "global_batch_size": 100, "samples_per_epoch": 5_000, "total_steps": 1_000}
    assert to_steps("10 epochs", **sizes) == 500
    assert to_steps("50k samples", **sizes) == 500
    assert to_steps("50%", **sizes) == 500
    assert to_steps("500 steps", **sizes) == 500


def test_rounds_to_the_nearest_step():
    assert to_steps("1 epoch", key="train.duration", global_batch_size=64, samples_per_epoch=1437) == 22
    assert to_steps("1 epoch", key="train.duration", global_batch_size=64, samples_per_epoch=1441) == 23


def test_epochs_need_a_sample_count_and_a_share_needs_a_run():
    with pytest.raises(UserError, match=r"evaluate\.every = '3 epochs' is in epochs, .*data\.train_samples"):
        to_steps("3 epochs", key="evaluate.every", global_batch_size=10, samples_per_epoch=None)
    with pytest.raises(UserError, match="cannot be the length of the run itself"):
        to_steps("5%", key="train.duration", global_batch_size=10, samples_per_epoch=10)
