import pytest
import yaml

from fastvit_engine.config import Config, load_config, recipe_names
from fastvit_engine.errors import UserError


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# A comment\nname: mine\nmodel:\n  name: Ti/4\n  image_size: 16\ntrain:\n  duration: 3 epochs\n")
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_named_after_its_file(name):
    assert load_config(name).config.name == name


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
        ("train.global_batch_size=many", "configuration key 'train.global_batch_size' (--set) is 'many'"),
        ("train.global_batch_size=-1", "should be greater than 0"),
        ("train.precision=int8", "input should be 'fp32', 'bf16' or 'fp16'"),
        ("train.duration=5 weeks", "'5 weeks' is not a duration"),
        ("data.mean=[0.5, 0.5]", "configuration key 'data.mean' (--set) is [0.5, 0.5]: too few values"),
        ("data.mixup=0.2", "renamed configuration key: data.mixup is now augment.mixup (--set)"),
        ("model=B/16", "configuration key 'model' (--set) is 'B/16'"),
        ("model.name.size=B", "--set model.name.size: 'name' holds a single value, not a section"),
        ("train.precision", "is not of the form section.key=value"),
        ("train.global_batch_size=[", "the value is not valid YAML"),
    ],
)
def test_a_bad_override_is_one_clear_sentence(recipe, override, message):
    with pytest.raises(UserError) as error:
        load_config(str(recipe), [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_line_of_a_recipe_is_named(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("model:\n  name: B/16\n  image_sise: 224\n")
    with pytest.raises(UserError, match=r"'model.image_sise' \(bad.yaml:3\); did you mean 'model.image_size'"):
        load_config(str(path))
    path.write_text("model:\n  name: [B/16\n")
    with pytest.raises(UserError, match=r"bad.yaml line \d is not valid YAML"):
        load_config(str(path))
    path.write_text("just words")
    with pytest.raises(UserError, match="must hold sections"):
        load_config(str(path))


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        load_config("quikstart")


def test_a_configuration_cannot_change_after_it_was_validated():
    with pytest.raises(ValueError, match="frozen"):
        Config().model.name = "L/16"


def test_a_configuration_with_former_names_is_told_all_the_new_ones_at_once(tmp_path):
    path = tmp_path / "config.yaml"  # of a run folder
    path.write_text("data:\n  crop_scale:\n  - 0.2\n  - 1.0\n  flip: true\n  num_workers: 2\n")
    with pytest.raises(UserError) as error:
        load_config(str(path))
    assert str(error.value) == (
        "renamed configuration keys: data.crop_scale is now augment.crop_scale (config.yaml:2), "
        "data.flip is now augment.flip (config.yaml:5)"
    )
