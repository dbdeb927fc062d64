"""The measurement of a recipe on CIFAR-10: what is trained and measured on what, and what a second start repeats."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cifar10 import Experiment, main, report
from benchmarks.recipe_runs import Ran, Runs, Shards
from tests.benchmarks.test_resolution import EVALUATION_ROW, TRAINING_ROW

TOP1 = {0: 0.5, 1: 0.7}


class Commands:
    """In place of `fastvit`: writes what a training leaves, and measures TOP1 of the seed."""

    def __init__(self, average=False):
        self.average, self.words = average, []

    def __call__(self, words):
        self.words.append(list(words))
        if words[0] == "evaluate":
            seed = int(words[1].partition("seed-")[2].partition("/")[0])
            return Ran(json.dumps({"samples": 8, "top1": TOP1[seed], "loss": 1.0}), 1.0, 1.0)
        run = Path(words[words.index("--out") + 1])
        run.mkdir(exist_ok=True)
        rows = [
            {**TRAINING_ROW, "step": step, "samples": 2 * step, "images_per_second": 10.0 * step}
            for step in range(1, 13)
        ]
        rows += [{**EVALUATION_ROW, "step": step, "top1": step / 100} for step in (6, 12)]
        rows += [{**EVALUATION_ROW, "step": step, "top1": step / 50, "eval": "eval_ema"} for step in (6, 12)]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (run / "environment.json").write_text('{"training_flops_per_image": 3}')
        if self.average:
            (run / "model_ema.safetensors").touch()
        return Ran("", 120.0, 180.0)


@pytest.fixture
def experiment(empty_shards, tmp_path):
    """Of two training and two test shards, in a folder of runs that is there."""
    return Experiment("cifar10_cpu", Shards.of(empty_shards), Runs(tmp_path, Commands()), ("data.train_samples=8",))


def shards(words, key):
    """Names in the list of shards that a command has as an option, or as a setting."""
    named = words[words.index(key) + 1] if key in words else next(word for word in words if word.startswith(f"{key}="))
    return [Path(line).name for line in Path(named.partition("@")[2]).read_text().split()]


def test_every_seed_trains_on_all_training_shards_and_is_measured_on_all_test_shards(empty_shards, tmp_path):
    commands, out = Commands(), tmp_path / "out"
    words = [str(empty_shards), "--out", str(out), "--runs", str(tmp_path / "runs"), "--seeds", "0", "1"]
    words += ["--cpu-processes", "2", "--set", "model.depth=2", "--set", "data.train_samples=8"]
    main(words, commands)
    train, evaluate = commands.words[0], commands.words[1]
    assert shards(train, "data.train") == ["train-000000.tar", "train-000001.tar"]
    assert shards(evaluate, "--data") == ["test-000000.tar", "test-000001.tar"]
    assert {"seed=0", "model.depth=2"} <= set(train) and "seed=1" in commands.words[2]
    assert train[train.index("--cpu-processes") + 1] == "2"
    record, text = json.loads((out / "cifar10_cpu.json").read_text()), (out / "cifar10_cpu.md").read_text()
    assert record["top1"] == {"mean": pytest.approx(0.6), "std": pytest.approx(0.1)}
    assert [seed["curve"] for seed in record["seeds"]] == [[[1.5, 0.06], [3.0, 0.12]]] * 2
    assert record["seeds"][0]["flops"] == 24 * 3 and record["made_of"]["model"]["depth"] == 2
    assert text == report(record) and "**60.0 % ± 10.0** top-1 on 8 test images" in text
    assert "| 0 | 50.00 % | 1.000 |" in text and "| 3.0 |" in text
    assert str(tmp_path) not in text + json.dumps(record) and "hostname" not in record["environment"]
    assert all((out / f"cifar10_cpu.{form}").stat().st_size > 1000 for form in ("svg", "png"))


def test_settings_are_chosen_on_training_images_that_are_held_out(empty_shards, tmp_path):
    commands, out = Commands(), tmp_path / "out"
    words = [str(empty_shards), "--out", str(out), "--runs", str(tmp_path / "runs"), "--seeds", "0", "--choose"]
    main(words, commands)
    train, evaluate = commands.words
    assert shards(train, "data.train") == ["train-000000.tar"]
    assert shards(train, "data.eval") == shards(evaluate, "--data") == ["train-000001.tar"]
    assert "8 held-out training images" in (out / "cifar10_cpu.md").read_text()


def test_the_average_of_the_weights_is_measured_if_there_is_one(experiment, tmp_path):
    commands = Commands(average=True)
    record = replace(experiment, runs=Runs(tmp_path, commands)).measure(0)
    assert commands.words[1][1].endswith("seed-0/model_ema.safetensors")
    assert (record["weights"], record["curve"]) == ("averaged", [[1.5, 0.12], [3.0, 0.24]])


def test_a_seed_that_is_done_is_read_and_one_that_was_interrupted_has_no_time_of_its_command(experiment, tmp_path):
    words = experiment.runs.command.words
    first = experiment.measure(0)
    assert (first["cpu_s"], first["wall_s"]) == (180.0, 120.0)
    assert experiment.measure(0) == first and len(words) == 2
    (tmp_path / "seed-1").mkdir()
    assert experiment.measure(1)["cpu_s"] is None
    assert words[2][-2:] == ["--resume", "auto"]


def test_a_record_has_these_names_in_this_order(experiment, tmp_path):
    """Files of earlier measurements are read and compared."""
    experiment.measure(0)
    assert list(json.loads((tmp_path / "seed-0.json").read_text())) == [
        *("seed", "started", "commit", "load_average", "command", "samples", "top1", "loss", "weights", "steps"),
        *("epochs", "images", "flops", "training_s", "evaluations_s", "images_per_second", "wall_s", "cpu_s"),
        *("curve", "made_of"),
    ]


def test_a_record_of_other_settings_or_shards_is_refused(experiment):
    experiment.measure(0)
    shards = experiment.shards
    for other in (
        replace(experiment, settings=("data.train_samples=9",)),
        replace(experiment, shards=replace(shards, train=shards.train[:1])),
    ):
        with pytest.raises(SystemExit, match=r"seed-0\.json is of other settings or shards: name another folder"):
            other.measure(0)


def test_epochs_that_are_unknown_are_asked_for_before_training(experiment):
    with pytest.raises(SystemExit, match="photos does not say what an epoch is: --set data.train_samples=N"):
        replace(experiment, recipe="photos", settings=()).measure(0)
    assert not experiment.runs.command.words
