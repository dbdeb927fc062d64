"""Runs of a hybrid and of a ResNet: at ZeRO stages, from weights, and what is made of them."""

import json

import pytest
import torch

from fastvit_engine import evaluate, load_model
from fastvit_engine.cli import main
from fastvit_engine.models import ResNet
from fastvit_engine.observe.metrics import read_metrics
from tests.fastvit_engine.models.official_resnets import bit_arrays
from tests.fastvit_engine.models.weights.official import save
from tests.in_full import in_full

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Tiny parameters stay whole under ZeRO-3 by default, and buckets hold all of them: make the machinery work.
SHARD_EVERYTHING = "deepspeed.zero_optimization={stage3_param_persistence_threshold: 0, reduce_bucket_size: 50000}"
HYBRID = ["model.name=R+Ti/16", "model.image_size=32"]
# The sizes of the tiny run are those of a Transformer.
RESNET = ["model.name=R50x1", "model.image_size=32", *(f"model.{key}=null" for key in ("width", "depth", "heads"))]
# With an eps that makes Adam more than the sign of gradients that are nearly zero.
SHORT = ["train.precision=fp32", "train.duration=4 steps", "train.global_batch_size=8", "schedule.kind=constant",
         "schedule.warmup=1 step", "optimizer.learning_rate=1e-3", "optimizer.eps=1e-2"]  # fmt: skip


def losses(run):
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")[0]]


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory):
    """A run of each, on one process without ZeRO."""
    folder = tmp_path_factory.mktemp("plain")
    return {name: train(folder / name, *SHORT, *model, "zero.stage=0", "ema.decay=0.9")
            for name, model in (("hybrid", HYBRID), ("resnet", RESNET))}  # fmt: skip


@pytest.mark.parametrize(("name", "processes"), [("hybrid", 2), in_full("resnet", 2), ("resnet", 1)])
def test_zero_3_gives_the_same_curve(train, plain, tmp_path, name, processes):
    model = HYBRID if name == "hybrid" else RESNET
    run = train(tmp_path / "run", *SHORT, *model, "zero.stage=3", SHARD_EVERYTHING, processes=processes)
    assert losses(run) == pytest.approx(losses(plain[name]), abs=1e-4)
    assert len(set(losses(run))) == 4  # it learns, if not yet much


@pytest.mark.parametrize("name", ["hybrid", in_full("resnet")])
def test_bf16_stays_near_fp32(train, plain, tmp_path, name):
    model = HYBRID if name == "hybrid" else RESNET
    run = train(tmp_path / "run", *SHORT, *model, "train.precision=bf16", "zero.stage=2", processes=2)
    assert losses(run) == pytest.approx(losses(plain[name]), abs=0.05)


@pytest.mark.parametrize("name", ["hybrid", "resnet"])
def test_what_is_made_of_a_run(plain, shards, tmp_path, capsys, name):
    run = plain[name]
    model = load_model(run)
    assert isinstance(model, ResNet) == (name == "resnet")
    assert evaluate(model, shards).samples == 35
    words = [
        "fewshot",
        str(run),
        "--train",
        str(shards),
        "--eval",
        str(shards),
        "--shots",
        "1",
        "--seeds",
        "1",
        "--json",
    ]
    capsys.readouterr()
    assert main(words) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["shots"]["1"]["mean"] <= 1
    for target, path in (("timm", "x.safetensors"), ("npz", "x.npz")):
        assert main(["convert", str(run), str(tmp_path / path), "--to", target, "--ema"]) == 0
    images = torch.randn(2, 3, 32, 32)
    average = load_model(run, ema=True)
    with torch.no_grad():
        for path in ("x.safetensors", "x.npz"):
            torch.testing.assert_close(load_model(tmp_path / path)(images), average(images), rtol=0, atol=1e-5)
    figures = ["--figures", "filters", "pos_embed"]
    assert main(["inspect", str(run), "--out", str(tmp_path / "figures"), *figures]) == 2
    said = (
        "its ResNet, and their filters are no pictures" if name == "hybrid" else "R50x1 is a ResNet, which has neither"
    )
    assert said in capsys.readouterr().err
    words = ["--data", str(shards), "--tests", "occlusion", "--limit", "2", "--json"]
    assert main(["robustness", str(run), *words]) == 0
    assert len(json.loads(capsys.readouterr().out)["occlusion"]) > 1
    assert main(["report", str(run)]) == 0
    assert ("ViT R+Ti/16" in (run / "report.html").read_text()) == (name == "hybrid")


def test_a_linear_probe_of_an_official_resnet(train, tmp_path):
    weights = save(tmp_path / "bit.npz", bit_arrays())
    probe = ["optimizer.frozen=backbone", "model.head_bias=-1", *SHORT, "train.duration=2 steps"]
    settings = [setting for setting in RESNET if not setting.startswith("model.name")]
    run = train(tmp_path / "run", *probe, *settings, f"init.from={weights}", "model.name=R50x1", "model.num_classes=10")
    before, after = load_model(weights, num_classes=0), load_model(run)
    assert after.config.num_classes == 10
    state = before.state_dict()
    assert all(torch.equal(state[name], value) for name, value in after.state_dict().items() if name in state)
    assert after.head.fc.weight.any()


def test_weights_of_another_resnet_are_refused(train_command, execute, tmp_path):
    weights = save(tmp_path / "bit.npz", bit_arrays())
    settings = [*SHORT, "model.name=R+Ti/16", "model.image_size=32", f"init.from={weights}"]
    done = execute(train_command(tmp_path / "run", *settings))
    assert done.returncode == 2 and "contradicts the weights of init.from" in done.stderr
