"""The comparison of features: the same architecture on both sides, and every figure from a command."""

import json

import numpy as np
import pytest

from benchmarks.probe import main, report, shape_of
from benchmarks.recipe_runs import Ran
from fastvit_engine.config import load_config
from fastvit_engine.config.model_shape import resolve_shape
from tests.fastvit_engine.models.weights.official import random_arrays


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """A tiny model of 4-pixel patches, in the official layout."""
    path = tmp_path_factory.mktemp("weights") / "w.npz"
    np.savez(path, **random_arrays(patch=4, width=24, depth=2, heads=2, hidden=40, grid=2))
    return path


def test_random_weights_have_the_architecture_of_the_pretrained_ones(npz):
    model = load_config("probe", [*shape_of(str(npz)), "model.image_size=8"]).config.model
    shape = resolve_shape(model)
    assert (shape.patch_size, shape.width, shape.depth, shape.heads, shape.mlp_dim) == (4, 24, 2, 2, 40)
    assert (model.pool, model.activation, model.layer_scale) == ("cls", "gelu_tanh", None)


def test_every_figure_comes_from_a_command(npz, tmp_path, capsys):
    seen = []

    def command(words):
        seen.append(words)
        if words[0] == "train":
            return Ran("", 2.0, 3.0)
        pretrained = "pretrained" in words[1]
        if words[0] == "evaluate":
            assert pretrained
            return Ran(json.dumps({"models": [{"samples": 9, "top1": top1} for top1 in (0.8, 0.6)]}), 1.0, 1.0)
        assert words[words.index("--train") + 1].endswith("train-000000.tar")
        assert words[words.index("--eval") + 1].endswith("eval-000000.tar")
        found = {"5": {"seeds": [0.5, 0.7] if pretrained else [0.1, 0.3]}}
        return Ran(json.dumps({"shots": found}), 1.0, 1.0)

    folder, out = tmp_path / "shards", tmp_path / "out"
    main([str(npz), str(folder), "--out", str(out), "--seeds", "2", "--note", "A note."], command)
    record = json.loads((out / "probe.json").read_text())
    trained, random = record["sides"]["pretrained"], record["sides"]["random"]
    assert trained["probe"]["mean"] == pytest.approx(0.7) and trained["probe"]["std"] == pytest.approx(0.1)
    assert trained["fewshot"]["5"]["each"] == [0.5, 0.7]  # one backbone, so one command
    assert random["fewshot"]["5"]["each"] == [0.1, 0.3, 0.1, 0.3]  # two initialisations
    text = (out / "probe.md").read_text()
    assert text == report(record) and "A note." in text
    assert "| pretrained | 70.0 % ± 10.0 | 60.0 % ± 10.0 | 3 |" in text
    assert "| random |  | 20.0 % ± 10.0 |  |" in text
    told = json.dumps(record).replace(str(out), "") + text.replace(str(out), "")
    assert str(npz) not in told and str(tmp_path) not in told and "hostname" not in record["environment"]
    trainings = [words for words in seen if words[0] == "train"]
    assert ["--init" in words for words in trainings] == [True, True, False, False]
    assert sum("train.duration=1 steps" in words for words in trainings) == 2  # which leave random features as they are
    for words in trainings:
        given = {word.partition("=")[0] for word in words if "=" in word}
        assert {"seed", "optimizer.learning_rate", "train.duration", "data.eval_crop", "model.image_size"} <= given
        assert ("model.width=24" in words) == ("--init" not in words)
