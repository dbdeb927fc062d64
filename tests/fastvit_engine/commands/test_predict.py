"""`fastvit predict`."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastvit_engine
from fastvit_engine.config import load_config
from fastvit_engine.evaluate.one_pass import OnePass, config_for
from fastvit_engine.observe.progress import WorkProgress
from tests.fastvit_engine.commands.conftest import NAMES


@pytest.fixture
def photos(tmp_path, photo):
    """A folder of five photos, one of them in a folder below, and a text file."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    (folder / "more" / "4.JPG").write_bytes(photo(4))
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_probabilities_are_those_of_the_model_for_the_images_that_evaluation_sees(
    fastvit, model_file, photos, write_tar, photo, tmp_path
):
    code, found, errors = fastvit("predict", model_file, photos, "--top", 10, "--json", "--batch-size", 2)
    assert code == 0 and errors == "" and found["failed"] == []
    assert [one["image"].rpartition("/")[2] for one in found["images"]] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.JPG"]
    shard = write_tar(tmp_path / "a.tar", [p for n in range(5) for p in ((f"{n}.jpg", photo(n)), (f"{n}.cls", b"0"))])
    model = fastvit_engine.load_model(model_file)
    config = config_for(model, load_config(None, ["data.num_workers=0"]))
    (batch,) = OnePass.over(str(shard), "eval", config, named="x").batches(
        5, doing="", progress=WorkProgress(quiet=True)
    )
    with torch.no_grad():
        expected = model(batch.images).softmax(1).numpy()
    for one, probabilities in zip(found["images"], expected, strict=True):
        assert [entry["class"] for entry in one["classes"]] == np.argsort(-probabilities).tolist()
        for entry in one["classes"]:
            assert entry["probability"] == pytest.approx(probabilities[entry["class"]], abs=1e-6)
            assert entry["name"] == NAMES[entry["class"]]


def test_lines_for_people_and_a_sheet(fastvit, model_file, photos, tmp_path):
    out = tmp_path / "sheet.png"
    code, printed, errors = fastvit("predict", model_file, photos / "0.jpg", photos / "more", "--out", out, "--top", 2)
    assert code == 0 and errors == f"{out}: 2 images\n"
    lines = printed.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"{photos}/0.jpg: ") and lines[0].count(" %") == 2
    assert any(name in lines[0] for name in NAMES)
    assert Image.open(out).height > 200


def test_without_names_classes_have_numbers(fastvit, write_model, photos):
    code, found, _ = fastvit("predict", write_model(names=None), photos / "0.jpg", "--json", "--top", 1)
    assert code == 0 and [list(entry) for entry in found["images"][0]["classes"]] == [["class", "name", "probability"]]
    assert found["images"][0]["classes"][0]["name"] is None


def test_files_that_are_no_images_are_named_one_by_one(fastvit, model_file, photos):
    words = [photos / "notes.txt", photos / "0.jpg", photos / "gone.jpg"]
    code, found, errors = fastvit("predict", model_file, *words, "--json")
    assert code == 0 and [one["image"] for one in found["images"]] == [str(words[1])]
    assert [one["path"] for one in found["failed"]] == [str(words[0]), str(words[2])]
    assert errors.splitlines() == [
        f"fastvit: {words[0]} cannot be used: not an image",
        f"fastvit: {words[2]} cannot be used: No such file or directory",
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["MODEL", "notes.txt"], "none of 1 files is an image that can be used"),
        (["MODEL", "EMPTY"], "holds no images: name a folder of images"),
        (["gone.safetensors", "0.jpg"], "gone.safetensors does not exist"),
        (["MODEL", "0.jpg", "--out", "nowhere/sheet.png"], "nowhere/sheet.png cannot be written"),
        (["MODEL", "0.jpg", "--out", "EMPTY"], "it is a folder, and --out names a file"),
        (["MODEL", "1.jpg", "0.jpg", "--out", "0.jpg"], "0.jpg is an input of this command, which --out would replace"),
        (["MODEL", ".", "--out", "more/4.JPG"], "more/4.JPG is an input of this command"),
    ],
)
def test_bad_input_is_one_sentence(fastvit, model_file, photos, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(photos)
    (tmp_path / "empty").mkdir()
    files = {"MODEL": model_file, "EMPTY": tmp_path / "empty"}
    code, out, errors = fastvit("predict", *(files.get(word, word) for word in words))
    assert code == 2 and sentence in errors.splitlines()[-1] and out == ""
    assert errors.splitlines()[-1].startswith("fastvit: error: ")


def test_scores_that_overflow_are_refused(fastvit, write_model, photos):
    path = write_model(names=None)
    state = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(state | {"head.weight": torch.full_like(state["head.weight"], 3e38)}, path, metadata=metadata)
    code, out, errors = fastvit("predict", path, photos / "0.jpg", "--json")
    assert code == 2 and out == "" and f"the scores of '{photos}/0.jpg' are not finite" in errors


def test_what_the_weights_do_not_say_is_a_note(fastvit, model_file, photos, tmp_path):
    with safe_open(model_file, "pt") as file:
        said = {key: text for key, text in file.metadata().items() if key not in ("mean", "std")}
    path = tmp_path / "unsaid.safetensors"
    save_file(load_file(model_file), path, metadata=said)
    code, _, errors = fastvit("predict", path, photos / "0.jpg", "--json")
    assert code == 0
    assert errors == f"note: {path} does not say mean and std of its pixels: taking 0.5 and 0.5\n"
