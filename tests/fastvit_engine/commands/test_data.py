import argparse
import json
import subprocess
import sys

import pytest
from PIL import Image

from fastvit_engine.cli import main
from fastvit_engine.commands import data as data_command
from fastvit_engine.data import prepare_data


def _run(*words: str) -> int:
    parser = argparse.ArgumentParser(prog="fastvit")
    data_command.add(parser.add_subparsers())
    args = parser.parse_args([str(word) for word in words])
    return args.run(args)


def test_make_digits_end_to_end(tmp_path, capsys, make_config):
    pytest.importorskip("sklearn")
    out = tmp_path / "digits"
    assert _run("data", "make", "digits", "--out", out, "--samples-per-shard", "400") == 0
    assert "1,617 train samples in 5 shards, 180 eval samples in 1 shards" in capsys.readouterr().out
    assert json.loads((out / "dataset.json").read_text())["source"] == "digits"
    config = make_config(out, eval=out)
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_classes": 10})})
    plan = prepare_data(config, world_size=1, index_folder=tmp_path)
    assert plan.samples_per_epoch == 1617 and plan.class_names == list("0123456789")
    batches = list(plan.eval_batches(config, rank=0, world_size=1, batch_size=64, pin_memory=False))
    assert sum(int(batch.weights.sum()) for batch in batches) == 180


def test_make_passes_every_argument_on(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("fastvit_engine.data.build.make.make_dataset", lambda *args, **options: given.update(options))
    words = (
        "--format list --labels tag --classes names.txt --eval-source val.csv --eval-labels other --max-failed 0.1 "
        "--eval-fraction 0.2 --samples-per-shard 7 --seed 3 --resize 64 --quality 80 --dedup --workers 2 --part 2/5 "
        "--plan-only"
    )
    assert _run("data", "make", "list.csv", "--out", tmp_path, *words.split()) == 0
    assert {name: str(value) for name, value in given.items()} == {
        "format": "list",
        "labels": "tag",
        "classes": "names.txt",
        "eval_source": "val.csv",
        "eval_labels": "other",
        "max_failed": "0.1",
        "eval_fraction": "0.2",
        "samples_per_shard": "7",
        "seed": "3",
        "resize": "64",
        "quality": "80",
        "dedup": "True",
        "workers": "2",
        "part": "(2, 5)",
        "plan_only": "True",
    }


def test_verify_says_what_is_wrong_and_exits_with_it(tmp_path, write_tar, photo, capsys):
    write_tar(tmp_path / "a.tar", [("k1.jpg", photo(1)), ("k1.cls", b"0"), ("k2.jpg", photo(1)), ("k2.cls", b"5")])
    assert _run("data", "verify", tmp_path) == 0
    assert "warning: duplicate image, 1 found" in capsys.readouterr().out
    assert _run("data", "verify", tmp_path, "--strict") == 1
    capsys.readouterr()
    assert _run("data", "verify", tmp_path, "--num-classes", "5", "--json", "--workers", "1") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["errors"]["wrong label"]["examples"] == ["k2 of a.tar has label 5, outside 0..4"]
    assert main(["data", "verify", str(tmp_path / "nowhere")]) == 2
    assert "nowhere, which does not exist" in capsys.readouterr().err


def test_stats_and_show_write_their_sheets(shards, tmp_path, capsys):
    assert _run("data", "stats", shards, "--json", "--sheet", tmp_path / "sheet.png") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 35
    recipe = ["photos", "--set", f"data.train={shards}"]
    assert _run("data", "show", *recipe, "--rows", "2", "--draws", "3", "--sheet", tmp_path / "show.png") == 0
    for name in ("sheet.png", "show.png"):
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG" and image.width > 600


@pytest.mark.parametrize("action", ["make", "verify", "stats", "show"])
def test_help_shows_an_example(capsys, action):
    with pytest.raises(SystemExit) as stop:
        _run("data", action, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"\n  fastvit data {action} " in text and max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("part", ["1", "a/b", "1/", "-1/2"])
def test_part_that_is_none(tmp_path, capsys, part):
    with pytest.raises(SystemExit) as stop:
        _run("data", "make", "digits", "--out", tmp_path, f"--part={part}")
    assert stop.value.code == 2 and "is not of the form I/N" in capsys.readouterr().err


def test_importing_the_data_package_does_not_import_deepspeed():
    code = "import sys, fastvit_engine.data; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
