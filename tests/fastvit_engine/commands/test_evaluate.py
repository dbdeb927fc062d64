"""`fastvit evaluate`."""

import json

import numpy as np
import pytest
from PIL import Image

import fastvit_engine
from fastvit_engine.errors import UserError

QUICK = ("--set", "data.num_workers=0")


@pytest.fixture
def evaluate(fastvit, digits):
    """evaluate(model, ..., "--json") on held-out digits, whose names are numerals; the model's are words."""
    return lambda *words: fastvit("evaluate", *words, "--data", digits, *QUICK)


def test_figures_are_those_of_the_function(evaluate, model_file, digits):
    code, figures, errors = evaluate(model_file, "--json", "--ignore-names")
    model = fastvit_engine.load_model(model_file)
    with pytest.raises(UserError, match="class 0 is 'zero' in the model and '0' in .* model.class_names = None"):
        fastvit_engine.evaluate(model, digits)
    model.class_names = None
    expected = fastvit_engine.evaluate(model, digits)
    assert code == 0 and errors == "" and list(figures) == ["samples", "top1", "top5", "loss"]
    assert (figures["samples"], figures["top1"], figures["top5"]) == (359, expected.top1, expected.top5)
    assert figures["loss"] == pytest.approx(expected.loss, abs=1e-5)


def test_several_models_have_a_mean_and_a_deviation(evaluate, write_model):
    models = [write_model(seed, names=None) for seed in range(3)]
    code, found, _ = evaluate(*models, "--json")
    assert code == 0 and [figures["model"] for figures in found["models"]] == list(map(str, models))
    for name in ("top1", "top5", "loss"):
        values = [figures[name] for figures in found["models"]]
        assert (found["mean"][name], found["std"][name]) == (np.mean(values), np.std(values))
        assert found["std"][name] > 0
    code, out, _ = evaluate(*models)
    assert code == 0 and out.count("(359 images)") == 3 and "mean of 3: top-1" in out


def test_the_table_and_the_picture_are_written(evaluate, model_file, tmp_path):
    code, out, errors = evaluate(model_file, "--out", tmp_path / "a" / "b", "--ignore-names")
    assert code == 0 and "(359 images)" in out and "weakest classes:" in out and "per_class.csv" in errors
    lines = (tmp_path / "a" / "b" / "per_class.csv").read_text().splitlines()
    assert len(lines) == 11 and lines[1].startswith("0,zero,")
    assert sum(int(line.split(",")[2]) for line in lines[1:]) == 359
    assert Image.open(tmp_path / "a" / "b" / "confusion.png").width > 400


def test_real_labels_and_the_images_without_any(evaluate, model_file, tmp_path):
    rng = np.random.default_rng(0)
    lists = [rng.choice(10, size=rng.integers(0, 4), replace=False).tolist() for _ in range(359)]
    (tmp_path / "real.json").write_text(json.dumps(lists))
    code, figures, errors = evaluate(model_file, "--real", tmp_path / "real.json", "--json", "--ignore-names")
    labelled = sum(map(bool, lists))
    assert code == 0 and f"--real has labels for {labelled} of 359 images" in errors
    assert 0 < figures["real"] < 1 and figures["real"] * labelled == pytest.approx(round(figures["real"] * labelled))
    (tmp_path / "all.json").write_text(json.dumps([list(range(10))] * 359))
    assert evaluate(model_file, "--real", tmp_path / "all.json", "--json", "--ignore-names")[1]["real"] == 1.0
    limited = ("--limit", 20, "--json", "--ignore-names")
    assert evaluate(model_file, "--real", tmp_path / "all.json", *limited)[1]["samples"] == 20


def test_outputs_that_the_data_has_no_class_for_are_said(evaluate, write_model):
    code, figures, errors = evaluate(write_model(names=None, num_classes=12), "--json")
    assert code == 0 and figures["samples"] == 359
    assert errors.startswith(
        "note: the model has 12 outputs and the data 10 classes: an answer of the other outputs is"
    )


def test_only_some_classes_count(evaluate, model_file):
    code, figures, errors = evaluate(model_file, "--classes", "three,4,5", "--json")
    assert code == 0 and figures["top5"] is None and "3 of 10 outputs count" in errors
    assert 0 < figures["samples"] < 359 and f"{359 - figures['samples']} of 359 images" in errors
    code, permuted, _ = evaluate(model_file, "--classes", "9,8,7,6,5,4,3,2,1,0", "--json")
    assert code == 0 and permuted["samples"] == 359  # label n is entry n
    assert permuted["top1"] != evaluate(model_file, "--json", "--ignore-names")[1]["top1"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["MODEL"], "class 0 is 'zero' in the model and '0' in the data"),
        (["MODEL", "MODEL", "--out", "x"], "--out takes the table of one model"),
        (["MODEL", "--classes", "eleven"], "has 'eleven', which is no class of the model: did you mean 'seven'"),
        (["MODEL", "--real", "gone.json", "--ignore-names"], "--real gone.json cannot be read"),
        (["MODEL", "--real", "SHORT", "--ignore-names"], "--real has 2 lists and --data 359 images"),
        (["MODEL", "--real", "SHORT", "--classes", "1"], "--real and --classes say differently"),
        (["MODEL", "--labels", "list"], "--labels says what the labels count among --classes"),
        (["MODEL", "--classes", ""], "--classes '' has no class: name the outputs that count"),
        (["MODEL", "--classes", "-1"], "--classes has '-1', which is no class of the model"),
        (["MODEL", "--classes", "3,10"], "--classes has 10, outside of the model's outputs 0..9"),
        (["MODEL", "--classes", "FOLDER"], "folder is a folder: give a file, or classes separated by commas"),
        (["MODEL", "--classes", "BYTES"], "bytes.json is not valid JSON: it must be a list"),
        (["MODEL", "--classes", "EMPTY"], "empty.txt' has no class: name the outputs that count"),
        (["MODEL", "--classes", "OBJECT"], "object.json is not a JSON list: give the outputs that count as a list"),
        (["MODEL", "--real", "FOLDER", "--ignore-names"], "folder cannot be read (Is a directory)"),
        (["MODEL", "--real", "BYTES", "--ignore-names"], "bytes.json is not valid JSON: it must be a list"),
        (["MODEL", "--real", "EMPTY", "--ignore-names"], "empty.txt is not valid JSON: it must be a list"),
        (["MODEL", "--real", "OBJECT", "--ignore-names"], "object.json is not a JSON list of lists"),
        (["MODEL", "--real", "NONE", "--ignore-names"], "--real has 0 lists and --data 359 images"),
        (["MODEL", "--real", "BARE", "--ignore-names"], "no image has a label in --real"),
        (["MODEL", "--real", "OUTSIDE", "--ignore-names"], "has 10 for image 1, which is none of the model's outputs"),
        (["SMALL"], "has label 9, outside 0..2: evaluate with a model of as many classes as the data"),
        (["gone.safetensors"], "gone.safetensors does not exist"),
        (["gone.safetensors", "--out", "FILE"], "short.json is no folder that you may write to"),
        (["gone.safetensors", "--out", "FILE/below"], "short.json is no folder that you may write to"),
    ],
)
def test_bad_input_is_one_sentence(evaluate, model_file, write_model, tmp_path, words, sentence):
    (tmp_path / "short.json").write_text("[[1], [2]]")
    files = {"MODEL": model_file, "SHORT": tmp_path / "short.json", "FOLDER": tmp_path / "folder"}
    files |= {"FILE": tmp_path / "short.json", "FILE/below": tmp_path / "short.json" / "below"}
    files["FOLDER"].mkdir()
    bad = {"bytes.json": b"[\xff]", "empty.txt": b"", "object.json": b'{"a": [1]}', "none.json": b"[]"}
    bad |= {"bare.json": str([[]] * 359).encode(), "outside.json": b"[[1], [10]]"}
    for name, content in bad.items():
        files[name.partition(".")[0].upper()] = tmp_path / name
        (tmp_path / name).write_bytes(content)
    if "SMALL" in words:
        files["SMALL"] = write_model(names=None, num_classes=3)
    code, out, errors = evaluate(*(files.get(word, word) for word in words))
    assert code == 2 and sentence in errors and out == ""
    assert errors.startswith("fastvit: error: ") and errors.count("\n") == 1
