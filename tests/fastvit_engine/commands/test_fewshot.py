"""`fastvit features` and `fastvit fewshot`."""

import json
import shutil

import numpy as np
import pytest

from fastvit_engine.evaluate.features import Features, save_features
from fastvit_engine.evaluate.fewshot import few_shot_accuracy

QUICK = ("--set", "data.num_workers=0")


@pytest.fixture(scope="module")
def made(model_file, digits, tmp_path_factory):
    """The features of both sets of digits, and the figures that follow from them."""
    from fastvit_engine.cli import main

    folder = tmp_path_factory.mktemp("features")
    for split in ("train", "eval"):
        words = ["features", model_file, "--data", digits, "--split", split, "--out", folder / f"{split}.npz", *QUICK]
        assert main([str(word) for word in words]) == 0
    return folder


def test_features_hold_one_row_per_sample(made, digits):
    train, evaluation = (np.load(made / f"{split}.npz") for split in ("train", "eval"))
    assert (train["features"].shape, evaluation["features"].shape) == ((1438, 32), (359, 32))
    assert train["features"].dtype == np.float32 and train["labels"].dtype == np.int64
    assert len(set(train["keys"])) == 1438 and not set(train["keys"]) & set(evaluation["keys"])


def test_figures_follow_from_the_features_to_the_bit(fastvit, model_file, digits, made, tmp_path):
    out = tmp_path / "both.npz"
    words = ("--shots", 5, 1, "--seeds", 2, "--json")
    code, figures, errors = fastvit(
        "fewshot", model_file, "--train", digits, "--eval", digits, "--features-out", out, *words, *QUICK
    )
    assert code == 0 and errors == ""
    assert list(figures) == ["shots", "l2"] and list(figures["shots"]) == ["1", "5"] and figures["l2"] == 1024.0
    saved = np.load(out)
    arrays = [saved[name] for name in ("train_x", "train_y", "eval_x", "eval_y")]
    for shots, found in figures["shots"].items():
        expected = [few_shot_accuracy(*arrays, shots=int(shots), num_classes=10, seed=seed) for seed in range(2)]
        assert found == {"mean": np.mean(expected), "std": np.std(expected), "seeds": expected}
    assert fastvit("fewshot", "--features", out, *words)[1] == figures
    assert fastvit("fewshot", "--features", made / "train.npz", made / "eval.npz", *words)[1] == figures
    assert figures["shots"]["5"]["mean"] > figures["shots"]["1"]["mean"] > 0.1


def test_other_strengths_give_other_figures(fastvit, made):
    files = ("fewshot", "--features", made / "train.npz", made / "eval.npz", "--shots", 5, "--json")
    strong, weak = (fastvit(*files, "--l2", l2)[1] for l2 in ("1e9", "1"))
    assert strong["shots"]["5"] != weak["shots"]["5"] and (strong["l2"], weak["l2"]) == (1e9, 1.0)


def test_the_table_names_mean_deviation_and_seeds(fastvit, made):
    code, out, _ = fastvit("fewshot", "--features", made / "train.npz", made / "eval.npz", "--shots", 5)
    assert code == 0 and out.startswith("accuracy on 359 images") and "5-shot" in out and "±" in out


def test_labels_that_only_one_set_has_are_said(fastvit, tmp_path):
    """As of shards whose classes are others, or more, than those of the training."""
    rng = np.random.default_rng(0)
    features = Features(rng.normal(size=(6, 4)).astype(np.float32), np.arange(6) // 2, np.array(list("abcdef")))
    save_features(tmp_path / "train.npz", features)
    save_features(tmp_path / "eval.npz", features._replace(labels=features.labels + 10))
    words = ("--features", tmp_path / "train.npz", tmp_path / "eval.npz", "--shots", 1, "--json")
    code, figures, errors = fastvit("fewshot", *words)
    assert code == 0 and figures["shots"]["1"]["mean"] == 0
    assert "3 classes of the evaluation data (first: class 10) have no training sample: their 6 of 6" in errors
    save_features(tmp_path / "eval.npz", features._replace(labels=features.labels - 1))
    code, _, errors = fastvit("fewshot", *words)
    assert code == 2 and errors.count("\n") == 1 and "eval.npz has the label -1, and classes are counted" in errors


def test_shards_in_both_sets_are_said(fastvit, model_file, digits):
    words = ("--train", digits / "eval-000000.tar", "--eval", f"{digits}/eval-*.tar", "--shots", 1, "--json")
    code, _, errors = fastvit("fewshot", model_file, *words, *QUICK)
    assert code == 0 and "note: 1 of the shards of --eval are in --train too: the figures flatter" in errors


def test_classes_with_few_samples_are_named(fastvit, tmp_path):
    rng = np.random.default_rng(0)
    labels = np.array([0] * 6 + [1] * 2)
    features = Features(rng.normal(size=(8, 4)).astype(np.float32), labels, np.array(list("abcdefgh")))
    save_features(tmp_path / "train.npz", features)
    save_features(tmp_path / "eval.npz", features._replace(labels=labels * 3))
    code, figures, errors = fastvit(
        "fewshot", "--features", tmp_path / "train.npz", tmp_path / "eval.npz", "--shots", 5, "--json"
    )
    assert code == 0 and figures["shots"]["5"]["mean"] <= 6 / 8
    assert "note: 1 class of the evaluation data (first: class 3) has no training sample: their 2 of 8" in errors
    assert "note: 5 shots: 1 class (first: class 1) has fewer training samples" in errors


def test_a_limit_and_the_order_of_the_file(fastvit, model_file, digits, made, tmp_path):
    code, out, _ = fastvit("features", model_file, "--data", digits, "--limit", 5, "--out", tmp_path / "f.npz", *QUICK)
    assert code == 0 and "5 images, 32 features each" in out
    assert np.load(tmp_path / "f.npz")["keys"].tolist() == np.load(made / "eval.npz")["keys"].tolist()[:5]


def test_the_size_of_the_model_may_be_repeated(fastvit, model_file, digits, tmp_path):
    words = ("--data", digits, "--limit", 5, "--image-size", 8, "--out", tmp_path / "f.npz", *QUICK)
    assert fastvit("features", model_file, *words)[0] == 0


def test_the_position_table_is_resampled_as_asked(fastvit, model_file, digits, tmp_path):
    words = ("--data", digits, "--limit", 5, "--out", tmp_path / "f.npz", *QUICK)
    found = {}
    for kind in ("bilinear", "bicubic"):
        resampled = ("--image-size", 16, "--interpolation", kind)
        assert fastvit("features", model_file, *resampled, *words)[0] == 0
        found[kind] = np.load(tmp_path / "f.npz")["features"]
        assert fastvit("convert", model_file, tmp_path / "m.safetensors", "--to", "timm", *resampled)[0] == 0
        assert fastvit("features", tmp_path / "m.safetensors", *words)[0] == 0
        np.testing.assert_array_equal(np.load(tmp_path / "f.npz")["features"], found[kind])
    assert np.abs(found["bilinear"] - found["bicubic"]).max() > 1e-4


@pytest.fixture
def bad(made, model_file, digits, tmp_path):
    """Words that stand for bad files."""
    rng = np.random.default_rng(0)
    labels = np.array([0, 1])
    save_features(tmp_path / "narrow.npz", Features(np.ones((2, 4), np.float32), labels, np.array(["a", "b"])))
    broken = np.full((2, 32), np.nan, np.float32)
    save_features(tmp_path / "nan.npz", Features(broken, labels, np.array(["a", "b"])))
    np.savez(tmp_path / "pickle.npz", features=np.array([{}], dtype=object), labels=labels, keys=np.array(["a"]))
    (tmp_path / "torn.npz").write_bytes((made / "eval.npz").read_bytes()[:999])
    shutil.copytree(digits, tmp_path / "renamed")
    info = json.loads((tmp_path / "renamed" / "dataset.json").read_text())
    info["classes"][3] = "cat"
    (tmp_path / "renamed" / "dataset.json").write_text(json.dumps(info))
    return {
        "MODEL": model_file,
        "DIGITS": digits,
        "TRAIN": made / "train.npz",
        "EVAL": made / "eval.npz",
        **{name.upper(): tmp_path / f"{name}.npz" for name in ("narrow", "nan", "pickle", "torn")},
        "RENAMED": tmp_path / "renamed",
        "OUT": tmp_path / "out.npz",
        "X": rng.integers(9),
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("fewshot", "MODEL is missing: give MODEL --train SHARDS --eval SHARDS, or --features"),
        ("fewshot MODEL --train DIGITS", "--eval SHARDS is missing"),
        ("fewshot MODEL --features TRAIN EVAL", "--features takes the place of MODEL"),
        ("fewshot --features TRAIN EVAL EVAL", "--features has 3 files"),
        ("fewshot --features TRAIN", "has no array 'train_x', only features, keys, labels"),
        ("fewshot --features TRAIN NARROW", "has 32 features per image and"),
        ("fewshot --features TRAIN NAN --features-out OUT", "nan.npz: the features of sample 'a' are not finite"),
        ("fewshot --features TRAIN EVAL --ema", "--ema is for a model, and --features are computed already"),
        ("fewshot --features TRAIN EVAL --image-size 16", "--image-size is for a model"),
        ("fewshot --features TRAIN EVAL --precision bf16", "--precision is for a model"),
        ("fewshot --features TRAIN EVAL --set data.eval_crop=1", "--set is for a model"),
        (
            "fewshot --features TRAIN EVAL --features-out EVAL",
            "eval.npz is an input of this command, which --features-out",
        ),
        ("features MODEL --data DIGITS --out MODEL", "is an input of this command, which --out would replace"),
        ("features MODEL --data DIGITS --out RENAMED", "it is a folder, and --out names a file"),
        ("fewshot --features TRAIN PICKLE", "allow_pickle=False"),
        ("fewshot --features TORN EVAL", "is not a whole file of features"),
        ("fewshot --features TRAIN gone.npz", "gone.npz does not exist"),
        ("fewshot --features TRAIN EVAL --l2 0", "--l2 is 0: give a number above 0"),
        ("fewshot MODEL --train DIGITS --eval nowhere", "--eval names the shard nowhere, which does not exist"),
        ("fewshot MODEL --train DIGITS --eval RENAMED", "class 3 is '3' in --train and 'cat' in --eval"),
        ("fewshot gone.safetensors --train DIGITS --eval DIGITS", "gone.safetensors does not exist"),
        ("features gone --data DIGITS --out OUT", "gone"),
        ("features MODEL --data nowhere --out OUT", "--data names the shard nowhere, which does not exist"),
        ("features MODEL --data DIGITS --out nowhere/f.npz --limit 1", "nowhere/f.npz cannot be written"),
        ("features MODEL --ema --data DIGITS --out OUT", "holds one set of weights"),
        ("features MODEL --data DIGITS --out OUT --set data.eval_crop=7", "configuration key 'data.eval_crop'"),
    ],
)
def test_bad_input_is_one_sentence(fastvit, bad, words, sentence):
    code, out, errors = fastvit(*(bad.get(word, word) for word in words.split()))
    assert code == 2 and sentence in errors and out == ""
    assert errors.startswith("fastvit: error: ") and errors.count("\n") == 1
    assert not bad["OUT"].exists()


def test_features_in_bf16_are_near_those_in_fp32(fastvit, model_file, digits, made, tmp_path):
    words = ("--data", digits, "--limit", 9, "--precision", "bf16", "--out", tmp_path / "f.npz", *QUICK)
    assert fastvit("features", model_file, *words)[0] == 0
    found, expected = np.load(tmp_path / "f.npz")["features"], np.load(made / "eval.npz")["features"][:9]
    assert found.dtype == np.float32 and 1e-5 < np.abs(found - expected).max() < 0.1
