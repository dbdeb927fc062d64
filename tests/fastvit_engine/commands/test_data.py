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
    data_command.add(parser.add_subparsers(), "make shards")
    args = parser.parse_args([str(word) for word in words])
    return args.run(args)


def test_make_digits_end_to_end(tmp_path, capsys, make_config):
    pytest.importorskip("sklearn")
    out = tmp_path / "digits"
    assert _run("data", "make", "digits", "--out", out, "--samples-per-shard", "400") == 0
    assert "1,617 train samples in 5 shards, 180 eval samples in 1 shard" in capsys.readouterr().out
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
        "--format list --labels tag --classes names.txt --image-column img --label-column kind "
        "--eval-source val.csv --eval-labels other --max-failed 0.1 "
        "--eval-fraction 0.2 --samples-per-shard 7 --seed 3 --resize 64 --quality 80 --max-pixels 900 --dedup "
        "--workers 2 --part 2/5 --plan-only --leave-out a --leave-out */b"
    )
    assert _run("data", "make", "list.csv", "--out", tmp_path, *words.split()) == 0
    assert {name: str(value) for name, value in given.items()} == {
        "format": "list",
        "labels": "tag",
        "classes": "names.txt",
        "image_column": "img",
        "label_column": "kind",
        "eval_source": "val.csv",
        "eval_labels": "other",
        "max_failed": "0.1",
        "eval_fraction": "0.2",
        "samples_per_shard": "7",
        "seed": "3",
        "resize": "64",
        "quality": "80",
        "max_pixels": "900",
        "dedup": "True",
        "leave_out": "['a', '*/b']",
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


@pytest.fixture
def own_keys(tmp_path, write_tar, photo):
    """A folder of shards whose images and labels are under other keys than the defaults."""
    folder = tmp_path / "own"
    folder.mkdir()
    members = [("__MACOSX/._0.photo.jpg", b"x")]
    for n in range(6):
        members += [(f"{n}.photo.jpg", photo(n)), (f"{n}.json", json.dumps({"what": [n % 2, 2]}).encode())]
    write_tar(folder / "a.tar", members)
    return folder


OWN = ["--set", "data.image_key=photo.jpg", "--set", "data.label_key=json.what", "--set", "data.max_labels=2"]


def test_settings_of_the_recipe_reach_every_command(own_keys, tmp_path, capsys):
    assert _run("data", "verify", own_keys) == 1
    assert _run("data", "verify", own_keys, *OWN) == 0
    assert "1 macOS resource files (._*, __MACOSX/) ignored" in capsys.readouterr().out
    assert _run("data", "verify", own_keys, *OWN, "--set", "model.num_classes=2") == 1
    assert "has label 2, outside 0..1" in capsys.readouterr().out
    assert _run("data", "verify", own_keys, *OWN, "--set", "model.num_classes=2", "--num-classes", "3") == 0
    capsys.readouterr()
    assert _run("data", "stats", own_keys, *OWN, "--json", "--sheet", tmp_path / "sheet.png") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["classes"] == {"class 0": 3, "class 1": 3, "class 2": 6} and content["unusable"] == {}
    assert content["ignored"] == 1
    small = ["--set", "model.image_size=16", "--set", "train.micro_batch_size=4"]
    assert _run("data", "bench", own_keys, *OWN, *small, "--workers", "0", "--rounds", "1", "--quick", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["images_per_second"]["loader, 0 workers"] > 0
    assert _run("data", "index", own_keys, *OWN, "--out", tmp_path / "a.index") == 0
    assert _run("data", "index", own_keys, "--label-key", "json.what", "--out", tmp_path / "b.index") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("6 samples in 1 shard, 3 classes, hash" in line and "1 macOS" in line for line in lines)
    assert len({line.partition(", hash")[2] for line in lines}) == 1


def test_an_index_of_a_data_set_that_has_lost_a_shard_says_so(tmp_path, photo, capsys):
    for number in range(8):
        (tmp_path / "photos" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "ab"[number % 2] / f"{number}.jpg").write_bytes(photo(number))
    made = tmp_path / "made"
    assert _run("data", "make", tmp_path / "photos", "--out", made, "--samples-per-shard", "2") == 0
    capsys.readouterr()
    assert _run("data", "index", made) == 0
    assert "does not exist" not in capsys.readouterr().out
    lost = made / "train-000001.tar"
    lost.unlink()
    assert _run("data", "index", made) == 0
    assert f"warning: {lost}, which dataset.json lists, does not exist" in capsys.readouterr().out


def test_settings_come_from_a_recipe_too(own_keys, tmp_path, capsys):
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "data: {image_key: photo.jpg, label_key: json.what, max_labels: 2}\n"
        "model: {num_classes: 3}\nloss: {kind: sigmoid}\n"
    )
    assert _run("data", "verify", own_keys, "--recipe", recipe) == 0
    assert _run("data", "verify", own_keys, "--recipe", recipe, "--set", "model.num_classes=2") == 1
    assert main(["data", "verify", str(own_keys), "--set", "data.lable_key=x"]) == 2
    assert "label_key" in capsys.readouterr().err


def test_advice_of_errors_works_when_it_is_followed(own_keys, tmp_path, write_tar, photo, capsys):
    assert main(["data", "stats", str(own_keys)]) == 2
    assert "set data.image_key, which is 'jpg;jpeg;png;webp', to the extension" in capsys.readouterr().err
    assert main(["data", "stats", str(own_keys), *OWN[:2]]) == 0
    words = tmp_path / "words"
    words.mkdir()
    members = [("a.jpg", photo(1)), ("a.cls", b"cat"), ("a.json", b'{"id": 2}'), ("b.jpg", photo(2)), ("b.cls", b"dog")]
    write_tar(words / "a.tar", [*members, ("b.json", b'{"id": 0}')])
    index = ["data", "index", str(words), "--out", str(tmp_path / "x.index")]
    assert main(index) == 2
    assert "name the member or JSON field that holds the class index with data.label_key" in capsys.readouterr().err
    assert main([*index, "--set", "data.label_key=json.id"]) == 0
    assert main(["data", "make", str(words), "--out", str(tmp_path / "made"), "--eval-fraction", "0"]) == 0
    assert main(["data", "verify", str(tmp_path / "made")]) == 0


def test_commands_are_light_until_they_begin():
    code = (
        "import sys, argparse, fastvit_engine.commands.data as data\n"
        "data.add(argparse.ArgumentParser().add_subparsers(), 'make')\n"
        "print({'torch', 'numpy', 'PIL', 'webdataset', 'pydantic', 'cv2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.parametrize("action", ["make", "index", "verify", "stats", "show", "bench"])
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
