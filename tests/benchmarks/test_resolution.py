"""The comparison of two resolutions: the same FLOPs and as many tries on both sides, and test images choose nothing."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.recipe_runs import Ran, Runs, Shards
from benchmarks.resolution import SIDES, Experiment, Setup, main, report, verdict
from fastvit_engine.cli import main as fastvit
from tests.fastvit_engine.warm_ranks import run_ranks

TINY = ["model.width=16", "model.depth=1", "model.heads=2", "train.global_batch_size=8", "data.num_workers=0"]
TRAINING_ROW = {
    "step": 1, "epoch": None, "samples": 2, "loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "images_per_second": 1.0,
    "mfu": None, "data_wait": 0.0, "memory_bytes": 1, "samples_hash": "a", "seconds": 1.0,
}  # fmt: skip
EVALUATION_ROW = {"step": 1, "eval": "eval", "top5": 1.0, "loss": 1.0, "samples": 4, "seconds": 1.0}


@pytest.fixture
def folder(tmp_path, photo, write_tar):
    """Two training shards and one test shard, of 12 images each."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard, name in enumerate(("train-000000.tar.gz", "train-000001.tar.gz", "test-000000.tar.gz")):
        numbers = range(12 * shard, 12 * shard + 12)
        members = [((f"{n:03d}.jpg", photo(n, 32, 32)), (f"{n:03d}.cls", str(n % 10).encode())) for n in numbers]
        write_tar(folder / name, [member for pair in members for member in pair])
    return folder


@pytest.mark.distributed
def test_three_commands_from_shards_to_a_table(folder, tmp_path, capsys):
    """As `python -m benchmarks.resolution` does it, with ranks that start in no time."""

    def command(words):
        if words[0] == "train":
            assert run_ranks(words, 1, tmp_path / "log"), (tmp_path / "log").read_text()
            return Ran("", 2.0, 1.5)
        capsys.readouterr()
        assert fastvit(list(words)) == 0
        return Ran(capsys.readouterr().out, 1.0, 1.0)

    out = tmp_path / "out"
    words = [str(folder), "--out", str(out), "--pretrain-steps", "5", "--finetune-steps", "2", "--seeds", "1"]
    words += ["--processes", "1", "--finetune-rates", "1e-3", "--scratch-rates", "2e-3"]
    main([*words, *(word for setting in TINY for word in ("--set", setting))], command)
    record = json.loads((out / "resolution.json").read_text())
    two, one = (record["sides"][side]["runs"][0] for side in ("two", "one"))
    assert [len(run["phases"]) for run in (two, one)] == [2, 1]
    step = one["flops"] / record["steps"]["scratch"]
    assert 0 <= one["flops"] - two["flops"] < step  # from scratch has a part of a step more
    assert one["flops"] == one["phases"][0]["curve"][-1][0]
    assert two["samples"] == one["samples"] == 12 and 0 <= two["top1"] <= 1
    assert (two["wall_s"], two["cpu_s"], one["wall_s"]) == (4.0, 3.0, 2.0)
    assert "--init 32-0" in two["phases"][1]["command"] and "hostname" not in record["environment"]
    text = (out / "resolution.md").read_text()
    assert text == report(record) and str(tmp_path) not in text.replace(str(out), "")
    for side in SIDES:
        share = 100 * record["sides"][side]["top1"]["mean"]
        assert f"| {share:.1f} % ± 0.0 | {share:.1f} |" in text
    assert all((out / f"resolution.{form}").stat().st_size > 1000 for form in ("svg", "png"))


@pytest.mark.parametrize(("pretrain", "finetune"), [(1400, 400), (600, 180), (90, 500)])
def test_both_sides_have_the_same_flops_within_a_step(pretrain, finetune):
    setup = Setup(Shards(("a", "b"), ("c",)), pretrain_steps=pretrain, finetune_steps=finetune)
    small, large = setup._flops_per_step(32), setup._flops_per_step(48)
    two, one = pretrain * small + finetune * large, setup.steps()[2] * large
    assert 0 <= one - two < large and 2.2 < large / small < 2.4


def test_each_side_has_as_many_tries_and_no_test_image_chooses(tmp_path):
    commands = []

    def command(words):
        """A training whose accuracy is highest at a rate of 1e-3 from weights and of 4e-3 from scratch."""
        settings = dict(word.split("=", 1) for word, before in zip(words[1:], words, strict=False) if before == "--set")
        lists = [Path(settings[f"data.{split}"][1:]).read_text().split() for split in ("train", "eval")]
        commands.append((words[1], *lists))
        rate, run = float(settings["optimizer.learning_rate"]), Path(words[words.index("--out") + 1])
        top1 = 0.5 - abs(rate - (1e-3 if "--init" in words else 4e-3))
        run.mkdir()
        rows = [TRAINING_ROW, {**EVALUATION_ROW, "top1": top1}]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (run / "environment.json").write_text('{"training_flops_per_image": 3, "global_batch_size": 2}')
        return Ran("", 1.0, 1.0)

    setup = Setup(Shards(("a", "b", "c"), ("d",)), pretrain_steps=3, finetune_steps=3)
    tried, finetune_rate, scratch_rate = Experiment(setup, Runs(tmp_path, command, 2)).tries()
    assert (finetune_rate, scratch_rate) == (1e-3, 4e-3)
    assert len(tried["two"]) == len(tried["one"]) == 3 and tried["two"][1e-3] == 0.5
    assert {(tuple(train), tuple(held_out)) for _, train, held_out in commands} == {(("a", "b"), ("c",))}
    assert [recipe for recipe, *_ in commands] == ["cifar10_cpu"] + ["finetune_cifar10_cpu"] * 3 + ["cifar10_cpu"] * 3


def test_unequal_numbers_of_tries_are_refused(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(folder), "--out", str(tmp_path), "--scratch-rates", "1e-3"])
    assert "the same number of learning rates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("two", "one", "sentence"),
    [
        (
            (0.52, 0.54),
            (0.50, 0.51),
            "2.5 points better than training at 48 from scratch with 100.00 % of its FLOPs",
        ),
        ((0.50, 0.54), (0.50, 0.52), "1.0 points better .*; the runs of both overlap"),
        ((0.40, 0.42), (0.50, 0.52), "10.0 points worse .*; the runs of both overlap"),
    ],
)
def test_the_verdict_follows_from_the_figures(two, one, sentence):
    sides = {
        name: {"top1": {"mean": sum(top1) / 2}, "runs": [{"top1": each, "flops": 8.0} for each in top1]}
        for name, top1 in (("two", two), ("one", one))
    }
    assert re.search(sentence, verdict({"sides": sides}))
