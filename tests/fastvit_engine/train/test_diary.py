"""What a run remembers of its configurations, from one start to the next."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvit_engine.config import Config, load_config
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.run_folder import RunFolder
from fastvit_engine.train import diary
from fastvit_engine.train.diary import changes, record_configuration

FLAT = {
    ("optimizer", "learning_rate"): st.floats(1e-6, 1.0),
    ("model", "drop_path"): st.floats(0, 0.9),
    ("data", "mean"): st.lists(st.floats(0, 1), min_size=3, max_size=3),
    ("data", "train"): st.none() | st.text(),
    ("train", "log_every"): st.integers(1, 1000),
    ("deepspeed", "steps_per_print"): st.integers(0, 1000),
}


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def start(run, step, *overrides):
    return record_configuration(run, load_config("quickstart", overrides), step)


def configurations(run):
    return {path.name: yaml.safe_load(path.read_text()) for path in sorted(run.configs.iterdir())}


def test_a_first_start_has_nothing_to_compare_with(run, capsys):
    assert start(run, 0) == "configs/config-0001.yaml"
    assert read_events(run) == [] if run.events.exists() else True
    assert capsys.readouterr().out == ""
    assert run.config.read_text() == (run.configs / "config-0001.yaml").read_text()


def test_changes_are_printed_and_recorded_with_the_step_from_which_they_hold(run, capsys):
    start(run, 0)
    kept = start(run, 40, "optimizer.learning_rate=5e-4", "model.drop_path=0.1", "checkpoint.every=null")
    rate = load_config("quickstart").config.optimizer.learning_rate
    every = load_config("quickstart").config.checkpoint.every
    sentence = (
        f"changed from step 40 on: model.drop_path 0.0 -> 0.1; optimizer.learning_rate {rate} -> 0.0005; "
        f"checkpoint.every {every} -> null"
    )
    assert capsys.readouterr().out == sentence + "\n"
    (event,) = read_events(run)
    assert (event["event"], event["message"], event["step"]) == ("configuration", sentence, 40)
    assert event["changes"] == [
        {"key": "model.drop_path", "from": 0.0, "to": 0.1},
        {"key": "optimizer.learning_rate", "from": rate, "to": 0.0005},
        {"key": "checkpoint.every", "from": every, "to": None},
    ]
    assert kept == "configs/config-0002.yaml"
    assert [config["model"]["drop_path"] for config in configurations(run).values()] == [0.0, 0.1]
    assert yaml.safe_load(run.config.read_text())["model"]["drop_path"] == 0.1


def test_the_same_configuration_is_kept_once_and_one_that_comes_back_again(run):
    assert [start(run, step) for step in (0, 10, 20)] == ["configs/config-0001.yaml"] * 3
    assert start(run, 30, "seed=1") == "configs/config-0002.yaml"
    assert start(run, 40) == "configs/config-0003.yaml"
    assert [event["message"] for event in read_events(run)] == [
        "changed from step 30 on: seed 0 -> 1",
        "changed from step 40 on: seed 1 -> 0",
    ]


def test_a_run_of_an_earlier_version_is_compared_in_todays_names_and_its_configuration_kept(run):
    old = load_config("quickstart").config.model_dump(mode="json")
    old["data"]["mixup"] = 0.2 + old["augment"].pop("mixup")
    del old["model"]["layer_scale"]  # newer than the run
    old["train"]["gone"] = 3
    run.config.write_text(yaml.safe_dump(old))
    assert start(run, 7) == "configs/config-0002.yaml"
    (event,) = read_events(run)
    assert event["message"] == "changed from step 7 on: augment.mixup 0.2 -> 0.0; train.gone 3 -> not set"
    assert configurations(run)["config-0001.yaml"] == old


@pytest.mark.parametrize(("transform", "said"), [("fast", ""), ("timm", "data.eval_transform fast -> timm")])
def test_a_run_that_is_older_than_the_key_evaluated_fast(run, transform, said, capsys):
    old = load_config("quickstart").config.model_dump(mode="json")
    del old["data"]["eval_transform"]
    run.config.write_text(yaml.safe_dump(old))
    start(run, 7, f"data.eval_transform={transform}")
    assert capsys.readouterr().out == (f"changed from step 7 on: {said}\n" if said else "")


@pytest.mark.parametrize("text", ["", "[", "\0\0\0", "- a\n"])
def test_a_damaged_configuration_is_said_and_does_not_stop_the_run(run, text, capsys):
    run.config.write_text(text)
    start(run, 7)
    assert "what has changed since is not known" in capsys.readouterr().out
    assert yaml.safe_load(run.config.read_text())["name"] == "quickstart"


def test_keys_of_deepspeed_come_and_go_one_by_one(run):
    start(run, 0, "deepspeed.zero_optimization.reduce_bucket_size=5e8")
    start(run, 1, "deepspeed.zero_optimization.overlap_comm=true")
    assert read_events(run)[0]["changes"] == [
        {"key": "deepspeed.zero_optimization.overlap_comm", "from": "not set", "to": True},
        {"key": "deepspeed.zero_optimization.reduce_bucket_size", "from": 500000000, "to": "not set"},
    ]


def test_a_malformed_url_does_not_stop_the_run(run):
    start(run, 0)
    start(run, 1, "data.train=https://me:secret@[host/x.tar")
    assert read_events(run)[0]["changes"][0]["to"] == "https://[host/x.tar"


def test_passwords_are_not_recorded(run, capsys):
    start(run, 0)
    start(run, 1, "data.train=https://me:secret@host/x.tar?key=secret")
    assert "secret" not in capsys.readouterr().out + run.events.read_text()
    assert read_events(run)[0]["changes"][0]["to"] == "https://host/x.tar"


@given(st.fixed_dictionaries(FLAT), st.fixed_dictionaries(FLAT))
@settings(deadline=None)
def test_exactly_the_keys_that_differ_are_found(before, now):
    def config(values):
        content = {}
        for (section, key), value in values.items():
            content.setdefault(section, {})[key] = value
        return Config.model_validate(content)

    stored = yaml.safe_load(yaml.safe_dump(config(before).model_dump(mode="json")))
    expected = {
        f"{section}.{key}": (before[section, key], now[section, key])
        for section, key in FLAT
        if before[section, key] != now[section, key]
    }
    found = changes(stored, config(now))
    assert {change.key: (change.before, change.now) for change in found if "://" not in str(change)} == {
        key: values for key, values in expected.items() if "://" not in str(values)
    }


def test_another_signature_of_the_same_url_is_no_change(run, capsys):
    start(run, 0, "data.train=https://host/x.tar?sig=one", "checkpoint.path=s3://me:pw@bucket/run")
    capsys.readouterr()
    start(run, 1, "data.train=https://host/x.tar?sig=two", "checkpoint.path=s3://me:pw@bucket/run")
    assert capsys.readouterr().out == "" and not run.events.exists()


def test_a_full_disk_repeats_no_line_of_the_diary(run, capsys, monkeypatch):
    start(run, 0)
    capsys.readouterr()
    real, left = diary.atomic_write, [OSError(28, "No space left on device")] * 3

    def write(path, content):
        if left:
            raise left.pop()
        real(path, content)

    monkeypatch.setattr(diary, "atomic_write", write)
    start(run, 5, "seed=7")
    assert [event["step"] for event in read_events(run)] == [5]
    assert capsys.readouterr().out.count("changed from step 5 on") == 1
    assert "seed: 7" in run.config.read_text()
