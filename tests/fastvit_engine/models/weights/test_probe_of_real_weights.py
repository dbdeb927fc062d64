"""A linear probe of trained weights of somebody else, on a few real photos, against random features."""

import json

import pytest

from fastvit_engine.cli import main
from tests.fastvit_engine.models.weights.dinov2_weights import onnx_model, write_dinov2
from tests.fastvit_engine.warm_ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PIXELS = 154
RANDOM = ["model.name=S/14", "model.pool=cls", "model.layer_scale=1.0", "model.layer_norm_eps=1.0e-6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dinov2(onnx_model(), tmp_path_factory.mktemp("dinov2") / "hf")


def test_a_probe_of_trained_features_is_far_above_few_shot_from_random_ones(folder, real_data, tmp_path, capsys):
    photos = real_data / "fixture-tiny"
    train, held_out = f"{photos}/f-{{000000..000002}}.tar", f"{photos}/f-000003.tar"

    def probe(name, steps, *words):
        settings = [f"model.image_size={PIXELS}", "model.num_classes=10", f"train.duration={steps} steps"]
        settings += [f"data.train={train}", "data.num_workers=0", "train.global_batch_size=16", "train.precision=fp32"]
        settings += ["optimizer.learning_rate=0.01"]
        settings += ["evaluate.every=null", "checkpoint.every=null"]
        arguments = ["train", "probe", *words, *(word for setting in settings for word in ("--set", setting))]
        run, log = tmp_path / name, tmp_path / f"{name}.log"
        assert run_ranks([*arguments, "--out", str(run)], 1, log), log.read_text()
        return str(run)

    def figures(*arguments):
        capsys.readouterr()
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    trained = probe("trained", 20, "--init", str(folder), "--set", "init.interpolation=bicubic")
    random = probe("random", 1, *(word for setting in RANDOM for word in ("--set", setting)))
    top1 = figures("evaluate", trained, "--data", held_out)["top1"]
    few = {
        name: figures("fewshot", run, "--train", train, "--eval", held_out, "--shots", "5")["shots"]["5"]["mean"]
        for name, run in (("trained", trained), ("random", random))
    }
    assert top1 > few["random"] + 0.2 and few["trained"] > few["random"] + 0.2, (top1, few)
