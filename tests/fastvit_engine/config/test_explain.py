"""The documentation of the keys, in its three forms."""

import json

import pytest

from fastvit_engine.config.explain import Key, as_json, as_markdown, as_text, explain
from fastvit_engine.config.keys import fields
from fastvit_engine.errors import UserError


def test_the_committed_page_is_what_is_generated_now(pytestconfig):
    page = (pytestconfig.rootpath / "docs" / "configuration.md").read_text()
    assert page == as_markdown(explain()) + "\n", "run: fastvit config explain --markdown > docs/configuration.md"


def test_everything_is_explained_once():
    names = [key.key for section in explain() for key in section.keys]
    assert sorted(names) == sorted(fields())


@pytest.mark.parametrize(
    ("name", "form", "range", "default"),
    [
        ("checkpoint.keep", "integer", "> 0", 2),
        ("model.dropout", "number", ">= 0, < 1", 0.0),
        ("model.width", "integer or null", "> 0, <= 65536", None),
        ("augment.flip", "true or false", None, True),
        ("train.duration", "duration", None, "90 epochs"),
        ("evaluate.every", "duration or null", None, None),
        ("zero.stage", "one of auto, 0, 1, 2, 3", None, "auto"),
        ("optimizer.betas", "list of 2 numbers", "each >= 0, < 1", [0.9, 0.999]),
        ("augment.crop_scale", "list of 2 numbers", "each > 0, <= 1", [0.05, 1.0]),
        ("deepspeed", "mapping", None, {}),
    ],
)
def test_type_range_and_default(name, form, range, default):
    (section,) = explain(name)
    (key,) = section.keys
    assert (key.type, key.range, key.default, key.required) == (form, range, default, False)


def test_a_key_says_what_it_is():
    (section,) = explain("checkpoint.keep")
    assert section.keys == (
        Key("checkpoint.keep", "integer", "> 0", 2, False, "Number of most recent checkpoints to keep."),
    )
    assert "  checkpoint.keep: integer, > 0; default 2\n      Number of most recent" in as_text([section])


def test_a_section_has_all_its_keys():
    (section,) = explain("ema")
    assert section.description.startswith("Moving average") and [key.key for key in section.keys] == ["ema.decay"]


def test_training_shards_are_text_or_a_list_whose_entries_have_keys():
    key, entries = explain("data.train")
    assert key.keys[0].type == "text or list of sources or null"
    assert [(key.key, key.required) for key in entries.keys] == [
        ("data.train.shards", True),
        ("data.train.weight", False),
        ("data.train.index", False),
    ]


def test_json_holds_everything():
    read = json.loads(as_json(explain("checkpoint.keep")))
    assert read["sections"][0]["section"] == "checkpoint"
    assert read["sections"][0]["keys"][0]["default"] == 2


def test_a_name_that_does_not_exist_is_answered_with_the_one_that_is_meant():
    with pytest.raises(UserError, match="unknown configuration key 'lr'; did you mean 'optimizer.learning_rate'"):
        explain("lr")
