"""Trainings of recipes over shards: which words are run, and which records are of the same settings."""

import json
import re
import sys
from dataclasses import replace

import pytest

from benchmarks.recipe_runs import (
    Ran,
    Runs,
    Shards,
    environment_of,
    fastvit,
    folder_of_runs,
    is_of,
    keep,
    made_of,
    parser_of,
    shards_of,
)
from fastvit_engine.config import load_config

CONFIG = load_config("cifar10_cpu", []).config


@pytest.fixture
def folder(tmp_path):
    for name in ("train-000001.tar", "train-000000.tar.gz", "test-000000.tar", "train.txt", "eval-000000.tar"):
        (tmp_path / name).touch()
    return tmp_path


def test_shards_are_in_order_and_the_last_of_training_may_take_the_place_of_the_test_images(folder):
    shards = Shards.of(folder)
    assert shards.train == (str(folder / "train-000000.tar.gz"), str(folder / "train-000001.tar"))
    assert shards.test == (str(folder / "test-000000.tar"),)
    assert shards.held_out() == Shards(shards.train[:1], shards.train[1:])


def test_shards_that_are_missing_are_named(folder):
    with pytest.raises(SystemExit, match=r"has no dev-\*\.tar or dev-\*\.tar\.gz"):
        shards_of(folder, "dev")
    with pytest.raises(SystemExit, match="a.tar is the only training shard"):
        Shards(("a.tar",), ("b.tar",)).held_out()


def test_a_training_has_its_settings_and_names_no_folder_of_the_machine(tmp_path):
    heard = []
    runs = Runs(tmp_path, lambda words: heard.append(words) or Ran("", 1.0, 2.0), 2)
    data = f"data.train={runs.listed('train', ['/x/a.tar', '/x/b.tar'])}"
    trained = runs.train("one", "probe", [data, "seed=1"], options=("--init", str(tmp_path / "zero")))
    assert (tmp_path / "train.txt").read_text() == "/x/a.tar\n/x/b.tar\n"
    assert heard[0][:4] == ["train", "probe", "--init", str(tmp_path / "zero")]
    assert trained.command == (
        "fastvit train probe --init zero --set data.train=@train.txt --set seed=1 --cpu-processes 2 --out one "
        "--resume auto"
    )
    assert (trained.resumed, trained.cpu_s, trained.wall_s) == (False, 2.0, 1.0)
    (tmp_path / "one").mkdir()
    again = replace(runs, cpu_processes=None).train("one", "probe", [], resume=False)
    assert again.command == "fastvit train probe --out one"
    assert (again.resumed, again.cpu_s, again.wall_s) == (True, None, None)


def test_a_record_is_of_the_same_settings_whatever_its_seed_and_folder():
    wanted = made_of(CONFIG, ["/x/a.tar"])
    other = load_config("cifar10_cpu", ["seed=7", "data.train=elsewhere"]).config
    written = json.loads(json.dumps({"made_of": made_of(other, ["/y/a.tar"])}))
    assert is_of(written, wanted)
    assert not is_of(written, made_of(CONFIG, ["/x/b.tar"]))
    assert not is_of(written, made_of(load_config("cifar10_cpu", ["train.log_every=7"]).config, ["a.tar"]))
    assert not is_of(written, wanted | {"test_shards": ["c.tar"]})


def test_a_record_that_is_older_than_a_setting_had_its_default():
    wanted = made_of(CONFIG, ["a.tar"])
    written = json.loads(json.dumps(wanted))
    del written["data"]["max_labels"]
    assert is_of({"made_of": written}, wanted)
    other = made_of(load_config("cifar10_cpu", ["data.max_labels=2", "loss.kind=sigmoid"]).config, ["a.tar"])
    assert not is_of({"made_of": written}, other)
    assert not is_of({"made_of": {**written, "a_setting_that_was": 1}}, wanted)


def test_what_is_kept_is_read_and_what_is_made_of_something_else_is_refused(tmp_path):
    path, wanted = tmp_path / "record.json", made_of(CONFIG, ["a.tar"])
    measured = []

    def measure():
        measured.append(1)
        return {"top1": 0.5}

    first = keep(path, wanted, measure)
    assert first == {"top1": 0.5, "made_of": wanted} == keep(path, wanted, measure)
    assert measured == [1] and list(json.loads(path.read_text())) == ["top1", "made_of"]
    with pytest.raises(SystemExit, match=r"record\.json is of other settings or shards: name another folder"):
        keep(path, made_of(CONFIG, ["b.tar"]), measure)


def test_a_folder_of_runs_is_made_and_kept_if_it_is_named(tmp_path):
    with folder_of_runs(tmp_path / "a" / "runs") as folder:
        assert folder.is_dir()
    assert folder.is_dir()
    with folder_of_runs(None) as folder:
        assert folder.is_dir()
    assert not folder.exists()


def test_the_environment_has_the_command_and_no_folder_or_host(tmp_path):
    words = [str(tmp_path), "--out", str(tmp_path / "out"), "--set", "seed=1"]
    given = parser_of("", "files").parse_args(words)
    environment = environment_of("benchmarks.x", words, given)
    assert environment["command"] == "python -m benchmarks.x FOLDER --out DIR --set seed=1"
    assert "hostname" not in environment and len(environment["load_average"]) == 3


def test_a_command_may_have_variables_of_its_own(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS $KEPT $*"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setenv("KEPT", "7")
    ran = fastvit(["train", "probe"], OMP_NUM_THREADS="3")
    assert re.fullmatch("3 7 -m fastvit_engine train probe\n", ran.output)
