"""Ranges, order and documentation of the keys."""

from typing import get_args

import pytest

from fastvit_engine.config import Config, load_config
from fastvit_engine.config.keys import fields, sections
from fastvit_engine.errors import UserError


def test_a_configuration_cannot_change_after_it_was_validated():
    with pytest.raises(ValueError, match="frozen"):
        Config().model.name = "L/16"


def test_every_key_and_every_section_says_what_it_is():
    assert [name for name, field in fields().items() if not field.description] == []
    assert [name for name, model in sections().items() if not model.__doc__] == []


NONSENSE = {"nan": ".nan", "inf": ".inf", "-inf": "-.inf", "-1": "-1", "0": "0", "huge": "1.0e+300", "true": "true"}
HUGE_INTEGER = "1" + 30 * "0"
ALLOWED = {  # what makes sense, or is looked at again when the data is known
    "augment.cutmix": {"0"},
    "augment.mixup": {"0"},
    "augment.randaugment_magnitude": {"0"},
    "augment.randaugment_ops": {"0"},
    "checkpoint.keep": {"huge"},  # all of them
    "data.lanes": {"huge"},  # refused if there are fewer samples
    "data.max_bad_share": {"0"},
    "data.mean": {"0"},
    "data.num_workers": {"0"},
    "data.streams": {"huge"},  # refused if there are fewer shards
    "data.window": {"huge"},  # a whole lane
    "dino.centre_momentum": {"0"},
    "dino.local_views": {"0"},
    "train.fp8.bf16_first_blocks": {"0"},
    "train.fp8.bf16_last_blocks": {"0"},
    "health.compare_replicas_every": {"huge"},  # only before each checkpoint
    "health.max_rewinds": {"0", "huge"},
    "loss.label_smoothing": {"0"},
    "model.drop_path": {"0"},
    "model.dropout": {"0"},
    "model.head_bias": {"-1", "0"},
    "model.layer_scale": {"0"},
    "model.registers": {"0"},
    "optimizer.betas": {"0"},
    "optimizer.momentum": {"0"},
    "optimizer.head_weight_decay": {"0"},
    "optimizer.weight_decay": {"0"},
    "schedule.final_learning_rate": {"0"},
    "seed": {"0"},
    "tokens.patch_drop": {"0"},
    "train.log_every": {"huge"},  # only at the end
    "train.profile.ranks": {"0"},
    "watchdog.slow_rank_laps": {"huge"},
    "zero.stage": {"0"},
    "train.activation_checkpointing": {"0"},
}
OF_WHOLE = {("0", "model.num_classes")}  # what the section allows, and training does not


def numeric(annotation):
    """The numeric types that a nested annotation is made of."""
    arguments = get_args(annotation)
    inner = [kind for argument in arguments for kind in numeric(argument)]
    return inner or [kind for kind in (int, float) if annotation is kind or type(annotation) is kind]


NUMBERS = [key for key, field in fields().items() if numeric(field.annotation) and bool not in (field.annotation,)]


def overrides_with(key, value):
    """The value for `key`, in every position of a list."""
    length = len(default) if isinstance(default := fields()[key].default, tuple) else 0
    if key.startswith("data.train."):
        return [f"data.train=[{{shards: x, {key.rpartition('.')[2]}: {value}}}]"]
    good = [str(number) for number in default] if length else []
    lists = [f"[{', '.join([*good[:at], value, *good[at + 1 :]])}]" for at in range(length)]
    return [f"{key}={text}" for text in (lists or [value])]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("name", NONSENSE)
def test_a_number_that_makes_no_sense_is_refused_at_every_key(key, name):
    whole = float not in numeric(fields()[key].annotation)
    value = HUGE_INTEGER if name == "huge" and whole else NONSENSE[name]
    for override in overrides_with(key, value):
        if name in ALLOWED.get(key, ()):
            load_config(None, [override])
        else:
            named = key if (name, key) in OF_WHOLE else rf"configuration key '{key}' \(--set\)"
            with pytest.raises(UserError, match=rf"^{named} is "):
                load_config(None, [override])


def test_every_allowance_is_of_a_key():
    assert set(ALLOWED) <= set(NUMBERS) and "optimizer.betas" in NUMBERS and len(NUMBERS) > 50


@pytest.mark.parametrize("key", [name for name, field in fields().items() if field.annotation in (float, float | None)])
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_every_number_is_finite(key, value):
    if key.startswith("data.train."):
        override = f"data.train=[{{shards: x, {key.rpartition('.')[2]}: {value}}}]"
    else:
        override = f"{key}={value}"
    with pytest.raises(UserError, match=rf"configuration key '{key}' \(--set\) is -?(inf|nan): input should be"):
        load_config("quickstart", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.betas=[0.9, 1.5]", "'optimizer.betas' (--set) is 1.5: input should be less than 1"),
        (
            "optimizer.betas=[-0.1, 0.9]",
            "'optimizer.betas' (--set) is -0.1: input should be greater than or equal to 0",
        ),
        ("optimizer.betas=[0.9, .nan]", "'optimizer.betas' (--set) is nan: input should be a finite number"),
        ("optimizer.learning_rate=0", "'optimizer.learning_rate' (--set) is 0: input should be greater than 0"),
        ("data.std=[0, 0, 0]", "'data.std' (--set) is 0: input should be greater than 0"),
        (
            "data.mean=[127.5, 127.5, 127.5]",
            "'data.mean' (--set) is 127.5: input should be less than or equal to 1; "
            "pixels are in [0, 1]: divide a mean of 0 to 255 by 255",
        ),
        ("data.std=[58.4, 57.1, 57.4]", "'data.std' (--set) is 58.4: input should be less than or equal to 1"),
        (
            "data.std=[0.0009, 0.2, 0.2]",
            "greater than 0.002; a pixel of 0 to 255 has steps of 0.004: give the",
        ),
        ("train.log_every=yes", "'train.log_every' (--set) is True: write a number, not true or false"),
        ("augment.crop_scale=[1.0, 0.2]", "'augment.crop_scale' (--set) is [1.0, 0.2]: the first number must not be"),
        ("augment.crop_scale=[0.0, 1.0]", "'augment.crop_scale' (--set) is 0.0: input should be greater than 0"),
        (
            "augment.crop_scale=[0.5, 1.5]",
            "'augment.crop_scale' (--set) is 1.5: input should be less than or equal to 1",
        ),
        ("augment.crop_ratio=[2, 1]", "'augment.crop_ratio' (--set) is [2, 1]: the first number must not be greater"),
        ("augment.crop_ratio=[-1, 1]", "'augment.crop_ratio' (--set) is -1: input should be greater than 0"),
        ("seed=-1", "'seed' (--set) is -1: input should be greater than or equal to 0"),
        ("seed=9223372036854775808", "'seed' (--set) is 9223372036854775808: input should be less than"),
    ],
)
def test_numbers_have_ranges_and_pairs_are_ordered(override, message):
    with pytest.raises(UserError) as error:
        load_config("quickstart", [override])
    assert message in str(error.value)
