"""From a recipe and `--set` to a configuration, its origins, and the sentences about bad input."""

import copy
import pickle
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BeforeValidator

from fastvit_engine.config import load_config
from fastvit_engine.config.keys import alternatives, fields
from fastvit_engine.errors import UserError


def checked(key):
    """Whether the text of this key has a form of its own, as a duration or the name of a model has."""
    return (
        key in ("model.name", "train.objective", "train.profile.steps")
        or key.startswith("data.train.")
        or any(isinstance(entry, BeforeValidator) for entry in _metadata(fields()[key]))
    )


def _metadata(field):
    yield from field.metadata
    for member in (field.annotation, *get_args(field.annotation)):
        yield from getattr(member, "__metadata__", ())


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# A comment\nname: mine\nmodel:\n  name: Ti/4\n  image_size: 16\ntrain:\n  duration: 3 epochs\n")
    return path


def test_values_come_from_the_file_the_command_line_and_the_defaults(recipe):
    resolved = load_config(str(recipe), ["train.precision=fp32", "optimizer.learning_rate=1e-4"])
    assert resolved.config.model.name == "Ti/4"
    assert resolved.config.train.precision == "fp32"
    assert resolved.config.optimizer.learning_rate == 1e-4
    assert resolved.origins["model.name"] == "mine.yaml:4"
    assert resolved.origins["train.precision"] == "--set"
    assert resolved.origins["model.pool"] == "default"


def test_origins_are_shown_beside_each_value(recipe):
    lines = load_config(str(recipe), ["train.log_every=7"]).to_yaml(with_origins=True).splitlines()
    assert any(line.split() == ["image_size:", "16", "#", "mine.yaml:5"] for line in lines)
    assert any(line.split() == ["log_every:", "7", "#", "--set"] for line in lines)
    assert any(line.split() == ["seed:", "0", "#", "default"] for line in lines)


def test_resolved_yaml_is_a_recipe_again(recipe, tmp_path):
    resolved = load_config(str(recipe), ["deepspeed.zero_optimization.reduce_bucket_size=1000", "ema.decay=0.99"])
    again = tmp_path / "again.yaml"
    again.write_text(resolved.to_yaml())
    assert load_config(str(again)).config == resolved.config
    assert yaml.safe_load(resolved.to_yaml(with_origins=True)) == yaml.safe_load(resolved.to_yaml())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.durration=3 epochs",
            "unknown configuration key 'train.durration' (--set); did you mean 'train.duration'?",
        ),
        ("modl.name=B/16", "unknown configuration key 'modl' (--set); did you mean 'model'?"),
        ("model.zzz=1", "unknown configuration key 'model.zzz' (--set); valid: name, image_size"),
        ("lr=1e-3", "unknown configuration key 'lr' (--set); did you mean 'optimizer.learning_rate'?"),
        ("train.global_batch_size=many", "configuration key 'train.global_batch_size' (--set) is 'many'"),
        ("train.global_batch_size=-1", "should be greater than 0"),
        ("train.precision=int8", "input should be 'fp32', 'bf16', 'fp16' or 'fp8'"),
        ("train.duration=5 weeks", "'5 weeks' is not a duration"),
        ("train.duration=90", "'90' is not a duration without a unit: write '90 steps', '90 epochs', '90 samples'"),
        (
            "tokens.image_sizes=[[8]]",
            "is [8]: write pairs of a size and a point of the run, as [[128, 50%], [160, 75%]]",
        ),
        ("train.fp8.layers=[]", "is []: write at least 1"),
        ("data.mean=[0.5, 0.5]", "configuration key 'data.mean' (--set) is [0.5, 0.5]: too few values"),
        ("train.profile.ranks=0", "'train.profile.ranks' (--set) is 0: write a list in brackets, such as [0]"),
        ("evaluate.fewshot.shots=5", "is 5: write a list in brackets, such as [1, 5, 10, 25]"),
        ("train.profile.steps=all", "write the first and the last step, such as 100-105, or one step"),
        ("data.train=[{weight: 2}]", "configuration key 'data.train.shards' (--set) is missing"),
        ("data.mixup=0.2", "renamed configuration key: data.mixup is now augment.mixup (--set)"),
        ("model=B/16", "configuration key 'model' (--set) is 'B/16'"),
        ("model.name.size=B", "--set model.name.size: 'name' holds a single value, not a section"),
        ("base=quickstart", "unknown configuration key 'base' (--set)"),
        ("train.precision", "--set 'train.precision' is not of the form KEY=VALUE"),
        ("train.global_batch_size=[", "the value is not valid YAML"),
        ("train.global_batch_size=" + "[" * 100_000, "the value is not valid YAML"),
        ("train.global_batch_size=2024-13-45", "the value is not valid YAML"),
        (f"model.width={'9' * 5000}", "the value is not valid YAML"),
        ("model.image_size=1:30", "'model.image_size' (--set) is '1:30': input should be a valid integer"),
        ("data.train=\udcff.tar", "'data.train' (--set) is '\\udcff.tar', which is not UTF-8: rename the file"),
        (
            "data.train=[a.tar, b.tar]",
            "write entries as [{shards: a.tar, weight: 2}], and a glob in brackets as ./[",
        ),
    ],
)
def test_a_bad_override_is_one_clear_sentence(recipe, override, message):
    with pytest.raises(UserError) as error:
        load_config(str(recipe), [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_may_be_a_mapping_of_plain_or_nested_keys(recipe, tmp_path):
    flat = load_config(str(recipe), {"train.duration": "5 epochs", "zero.stage": 2, "data.train": tmp_path})
    assert (flat.config.train.duration, flat.config.zero.stage) == ("5 epochs", 2)
    assert flat.config.data.train == str(tmp_path)
    assert flat.origins["zero.stage"] == "overrides"
    nested = load_config(str(recipe), {"train": {"duration": "5 epochs"}, "data": {"train": [{"shards": "a"}]}})
    assert nested.config.train.duration == "5 epochs"
    assert nested.config.data.sources[0].shards == "a"
    assert nested.config.model.name == "Ti/4"  # of the recipe
    listed = load_config(str(recipe), {"data.train": [{"shards": tmp_path}, {"shards": "b"}]})
    assert [source.shards for source in listed.config.data.sources] == [str(tmp_path), "b"]
    with pytest.raises(UserError, match=r"unknown configuration key 'lr' \(overrides\); did you mean 'optimizer"):
        load_config(str(recipe), {"lr": 1e-3})
    with pytest.raises(UserError, match="overrides is the text 'zero.stage=2': give a list"):
        load_config(str(recipe), "zero.stage=2")


def test_one_step_to_profile_may_be_a_number(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntrain:\n  profile:\n    steps: 100\n")
    for resolved in (
        load_config(str(path)),
        load_config(None, {"train.profile.steps": 100}),
        load_config(None, ["train.profile.steps=100"]),
    ):
        assert resolved.config.train.profile.steps == "100"
    with pytest.raises(UserError, match="'train.profile.steps' .* is True"):
        load_config(None, {"train.profile.steps": True})


def test_a_section_asked_of_what_load_config_returns_says_where_it_is(recipe):
    resolved = load_config(str(recipe))
    with pytest.raises(AttributeError, match=r"sections in \.config: \.config\.model"):
        resolved.model  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'modle'"):
        resolved.modle  # noqa: B018
    assert pickle.loads(pickle.dumps(resolved)) == copy.deepcopy(resolved) == resolved


@pytest.mark.parametrize("text", ["model:\n\tname: B/16\n", "model: \n  name: B/16\n\thead: mlp\n"])
def test_a_tab_in_a_recipe_is_called_a_tab(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad.yaml line \d is not valid YAML: it holds a tab"):
        load_config(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model:\n  name: 'B/1", "line 2 is not valid YAML: .*"),
        (b"data: {train: a.tar, ev", "line 2 is not valid YAML: .*"),
        (b"model:\n  nam", r"'model' \(.*\) is '?nam'?.*"),
        (bytes(400), " is not valid YAML: .*"),
        (b"model:\n  name: B/16\n" + bytes(400), " is not valid YAML: .*"),
        (b"", " is empty: restore it, or write `name: ` and a name into it for a recipe of defaults"),
        (b"\n  \n", " is empty: restore it, .*"),
    ],
)
def test_a_torn_recipe_is_refused(tmp_path, content, message):
    path = tmp_path / "torn.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config(str(path))


def test_a_recipe_of_defaults(tmp_path):
    """The advice of the refusal of an empty file."""
    path = tmp_path / "defaults.yaml"
    path.write_text("name: mine\n")
    assert load_config(str(path)).config.name == "mine"


def test_a_number_without_a_unit_in_a_recipe_is_told_the_units(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("train:\n  duration: 90\n")
    with pytest.raises(UserError, match=r"'train.duration' \(bad.yaml:2\) is 90: '90' is not a duration without"):
        load_config(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "@list.txt",
        "*.tar",
        "&x.tar",
        "{a,b}/x.tar",
        "{0..3}.tar",
        "2024",
        "1e3",
        "true",
        "~/shards",
        "shards # of today/*.tar",
        "a: b",
        "'quoted'.tar",
        "[ab]/x-[0-9].tar",
        "pipe:cat x.tar | gzip -d",
        "%YAML",
        " spaces ",
        "- x",
    ],
)
def test_a_key_that_holds_text_takes_it_as_it_is(recipe, text):
    keys = ("name", "data.train", "data.eval", "data.index", "data.cache", "data.label_key", "checkpoint.path")
    config = load_config(str(recipe), [f"{key}={text}" for key in keys]).config
    values = [config.name, config.data.train, config.data.eval, config.data.index, config.data.cache]
    assert [*values, config.data.label_key, config.checkpoint.path] == [text] * len(keys)


TEXT_KEYS = [key for key, field in fields().items() if str in alternatives(field.annotation) and not checked(key)]
# Random text rarely looks like YAML: mix in what does.
TEXTS = st.text() | st.text("[]{}#&*!|>%@`'\"-?:,~ \t\na0123._eE", max_size=12)


@given(TEXTS.filter(lambda text: text.strip() not in ("", "~", "null", "Null", "NULL")))
@settings(deadline=None)
def test_any_text_arrives_unchanged_at_every_key_that_holds_text(text):
    assert {"name", "data.train", "data.eval", "data.image_key", "checkpoint.path"} <= set(TEXT_KEYS)
    for key in TEXT_KEYS:
        if key == "data.train" and text.lstrip().startswith("["):  # may be a list of sources
            continue
        both = [f"evaluate.fewshot.{name}=x" for name in ("train", "eval") if "fewshot" in key]  # one needs the other
        values = load_config(None, [*both, f"{key}={text}"]).config.model_dump()
        for part in key.split("."):
            values = values[part]
        assert values == text


@given(TEXTS.filter(lambda text: text.strip() not in ("", "~", "null", "Null", "NULL") and "://" not in text))
@settings(deadline=None)
def test_any_text_arrives_and_is_written_down_so_that_it_can_be_read_again(text):
    resolved = load_config("quickstart", [f"data.cache={text}", f"name={text}"])
    assert (resolved.config.data.cache, resolved.config.name) == (text, text)
    for written in (resolved.to_yaml(), resolved.to_yaml(with_origins=True)):
        assert yaml.safe_load(written) == resolved.config.model_dump(mode="json")


def test_numbers_are_decimal_whatever_their_zeros(recipe, tmp_path):
    config = load_config(str(recipe), ["train.log_every=0100", "optimizer.learning_rate=1e-3"]).config
    assert (config.train.log_every, config.optimizer.learning_rate) == (100, 0.001)
    path = tmp_path / "zeros.yaml"
    path.write_text("train:\n  log_every: 0100\n  grad_clip: .5\naugment:\n  crop_scale: [0_0.2, 1.]\n")
    config = load_config(str(path)).config
    assert (config.train.log_every, config.train.grad_clip, config.augment.crop_scale) == (100, 0.5, (0.2, 1.0))


@pytest.mark.parametrize("text", ["[ab]/x-[0-9]", "[ab].tar", "[", "[x", "]"])
def test_a_glob_that_begins_with_a_bracket_is_text(recipe, text):
    assert load_config(str(recipe), [f"data.train={text}"]).config.data.train == text


def test_secrets_of_urls_are_left_out_of_what_is_written_down_and_a_comment_says_so(recipe):
    url = "https://user:p4ss@host/{0..9}.tar?sig=s1gn"
    sources = f"[{{shards: '{url}', index: '{url}'}}]"
    for value, written in ((url, "https://host/{0..9}.tar"), (sources, {"shards": "https://host/{0..9}.tar"})):
        resolved = load_config(str(recipe), [f"data.train={value}", f"data.eval={url}", f"checkpoint.path={url}"])
        assert resolved.config.data.sources[0].shards == resolved.config.data.eval == url  # what training uses
        for text in (resolved.to_yaml(), resolved.to_yaml(with_origins=True)):
            assert text.startswith("# User names, passwords and queries of URLs are left out here")
            assert "p4ss" not in text and "s1gn" not in text
            train = yaml.safe_load(text)["data"]["train"]
            assert train == written if isinstance(written, str) else train[0]["shards"] == written["shards"]
    assert not load_config(str(recipe), ["data.train=s3://bucket/train-?.tar"]).to_yaml().startswith("#")


@pytest.mark.parametrize("text", ["x", "é", "\udcff", "\x01", "'\"", "x."])
@pytest.mark.parametrize("form", ["{}", "data.mean=[{}", "data.mean={}]", "data.cache={}", "{}=1", "seed.{}=1"])
def test_sentences_about_a_long_override_are_short(form, text):
    try:
        load_config("quickstart", [form.format(text * 4000)])
    except UserError as error:
        assert len(str(error)) < 5000 and "\n" not in str(error)
        assert "--set" in str(error) or "configuration key" in str(error)


def test_a_long_text_stays_on_its_line(recipe):
    text = "shards of many words " * 20
    lines = load_config(str(recipe), [f"data.train={text}"]).to_yaml(with_origins=True).splitlines()
    assert sum(line.startswith("  train: ") and line.endswith("  # --set") for line in lines) == 1


@pytest.mark.parametrize("text", ["null", "", "~", "Null", "NULL", " ~ "])
def test_null_is_null_where_the_key_may_be_null(recipe, text):
    keys = ["data.train", "data.eval", "checkpoint.path", "checkpoint.every", "checkpoint.keep_best"]
    config = load_config(str(recipe), [f"{key}={text}" for key in keys]).config
    assert config.data.train is config.data.eval is config.checkpoint.path is None
    assert config.checkpoint.every is config.checkpoint.keep_best is None
    assert load_config(str(recipe), ["name=null"]).config.name == "null"


def test_an_empty_section_in_a_mapping_changes_nothing(recipe):
    before = load_config(str(recipe))
    for empty in ({"train": {}}, {"model": {}, "data": {}}, {}):
        after = load_config(str(recipe), empty)
        assert after.config == before.config and after.origins == before.origins
    with pytest.raises(UserError, match=r"'model\.width' \(overrides\) is \{\}"):
        load_config(str(recipe), {"model": {"width": {}}})


def test_sources_are_a_list(recipe):
    config = load_config(str(recipe), ["data.train=[{shards: '{a,b}.tar', weight: 2}, {shards: c}]"]).config
    assert [(source.shards, source.weight) for source in config.data.sources] == [("{a,b}.tar", 2.0), ("c", 1.0)]
    with pytest.raises(UserError, match=r"'data.train' \(--set\) is 'a.tar': input should be a valid dictionary"):
        load_config(str(recipe), ["data.train=[a.tar, b.tar]"])
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(str(recipe), ["data.train=[{shards: x}"])


def test_a_bad_line_of_a_recipe_is_named(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("model:\n  name: B/16\n  image_sise: 224\n")
    with pytest.raises(UserError, match=r"'model.image_sise' \(bad.yaml:3\); did you mean 'model.image_size'"):
        load_config(str(path))


def test_a_configuration_with_former_names_is_told_all_the_new_ones_at_once(tmp_path):
    path = tmp_path / "config.yaml"  # of a run folder
    path.write_text("data:\n  crop_scale:\n  - 0.2\n  - 1.0\n  flip: true\n  num_workers: 2\n")
    with pytest.raises(UserError) as error:
        load_config(str(path))
    assert str(error.value) == (
        "renamed configuration keys: data.crop_scale is now augment.crop_scale (config.yaml:2), "
        "data.flip is now augment.flip (config.yaml:5)"
    )
