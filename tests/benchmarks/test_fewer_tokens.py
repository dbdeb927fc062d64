"""The comparison of plain training with fewer tokens: the same images or the same FLOPs, and a table of both."""

import json

import pytest

from benchmarks.fewer_tokens import VARIANTS, Experiment, main
from benchmarks.recipe_runs import Ran, Runs, Shards
from fastvit_engine.cli import main as fastvit
from tests.fastvit_engine.warm_ranks import run_ranks

TINY = ["model.width=16", "model.depth=2", "model.heads=2", "train.global_batch_size=8", "data.num_workers=0"]
TINY += [
    "data.train_samples=24",
    "data.streams=1",
    "schedule.warmup=1 step",
    "train.log_every=1",
    "evaluate.every=null",
]


@pytest.fixture
def folder(tmp_path, photo, write_tar):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard, name in enumerate(("train-000000.tar", "test-000000.tar")):
        numbers = range(24 * shard, 24 * shard + 24)
        members = [((f"{n:03d}.jpg", photo(n, 32, 32)), (f"{n:03d}.cls", str(n % 10).encode())) for n in numbers]
        write_tar(folder / name, [member for pair in members for member in pair])
    return folder


def test_options_train_longer_for_the_same_operations(tmp_path):
    experiment = Experiment(Shards(("train",), ("test",)), Runs(tmp_path, lambda words: Ran("", 0, 0)), epochs=2)
    plain = experiment.steps("plain", "images")
    assert plain == round(2 * 50_000 / 128)
    assert {experiment.steps(name, "images") for name in VARIANTS} == {plain}
    longer = {name: experiment.steps(name, "flops") / plain for name in VARIANTS}
    assert longer["plain"] == longer["drop_path_mask"] == 1
    assert 1.5 < longer["patch_drop"] < 1.9 and 1.8 < longer["image_sizes"] < 2.4
    assert 1.05 < longer["drop_path_subset"] < 1.2 and 1.4 < longer["packing"] < 1.8


@pytest.mark.distributed
def test_from_shards_to_a_table_and_again_from_its_records(folder, tmp_path, capsys):
    trained = []

    def command(words):
        if words[0] == "train":
            trained.append(words)
            assert run_ranks(words, 1, tmp_path / "log"), (tmp_path / "log").read_text()
            return Ran("", 2.0, 1.5)
        capsys.readouterr()
        assert fastvit(list(words)) == 0
        return Ran(capsys.readouterr().out, 1.0, 1.0)

    words = [str(folder), "--runs", str(tmp_path / "runs"), "--epochs", "3", "--seeds", "0"]
    words += ["--variants", "image_sizes", *(word for setting in TINY for word in ("--set", setting))]
    main([*words, "--out", str(tmp_path / "out")], command)
    record = json.loads((tmp_path / "out" / "fewer_tokens.json").read_text())
    plain, images, flops = record["rows"]
    assert [row["budget"] for row in record["rows"]] == ["images", "images", "flops"] and len(trained) == 3
    assert plain["images"] == images["images"] == 72 and images["flops"] < 0.7 * plain["flops"]
    assert abs(flops["flops"] / plain["flops"] - 1) < 0.1 and flops["images"] > 100
    text = (tmp_path / "out" / "fewer_tokens.md").read_text()
    assert "At equal images:" in text and "At equal FLOPs:" in text and str(tmp_path) not in text
    assert (tmp_path / "out" / "fewer_tokens.png").stat().st_size > 10_000
    main([*words, "--out", str(tmp_path / "again")], command)
    assert len(trained) == 3 and (tmp_path / "again" / "fewer_tokens.md").exists()
    with pytest.raises(SystemExit, match="is of other settings or shards"):
        main([*words, "--set", "optimizer.weight_decay=0.1", "--out", str(tmp_path / "other")], command)
