"""Ranges, order and documentation of the keys."""

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
        ("data.mean=[127.5, 127.5, 127.5]", "'data.mean' (--set) is 127.5: input should be less than or equal to 1"),
        ("data.std=[58.4, 57.1, 57.4]", "'data.std' (--set) is 58.4: input should be less than or equal to 1"),
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
