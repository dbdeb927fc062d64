"""Runs of masked autoencoders: the same on any number of processes, resumed to the bit, and what is left of them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastvit_engine import load_model
from fastvit_engine.checkpoint.export import find_checkpoint
from fastvit_engine.cli import main
from fastvit_engine.config import ModelConfig
from fastvit_engine.models import is_for_pretraining
from fastvit_engine.models.weights.pretrained import parameter_shapes
from fastvit_engine.observe.metrics import read_all_metrics
from fastvit_engine.observe.report.predictions import read_reconstructions
from fastvit_engine.observe.run_folder import RunFolder
from tests.fastvit_engine.train.test_finetune import at_stage, figures, losses, whole
from tests.in_full import in_full, only_in_full

pytestmark = pytest.mark.distributed

MAE = [
    "train.objective=mae",
    "model.num_classes=0",
    "model.pool=gap",
    "mae.decoder_width=16",
    "mae.decoder_depth=1",
    "mae.decoder_heads=2",
    "mae.mask_ratio=0.5",
    "train.precision=fp32",
    "train.duration=6 steps",
    "schedule.kind=constant",
    "schedule.warmup=1 step",
    "optimizer.learning_rate=1e-2",
    "ema.decay=0.9",
    "evaluate.every=3 steps",
]


@pytest.fixture(scope="module")
def settings(digits):
    return [*MAE, f"data.eval={digits}/eval-*.tar"]


@pytest.fixture(scope="module")
def few_shot(digits):
    return [*(f"evaluate.fewshot.{key}={digits}/eval-*.tar" for key in ("train", "eval")), "evaluate.fewshot.shots=[1]"]


@pytest.fixture(scope="module")
def run(train, settings, few_shot, tmp_path_factory):
    best = "checkpoint.keep_best=eval.loss"
    return train(tmp_path_factory.mktemp("mae") / "run", *settings, *few_shot, *at_stage(0), best)


def held_out(run):
    return [(row["step"], row["eval"], row["loss"], row["samples"]) for row in evaluations(run).losses]


def evaluations(run):
    return read_all_metrics(run / "metrics.jsonl")


def test_a_run_records_the_loss_of_held_out_images_and_no_accuracy(run):
    rows = held_out(run)
    assert [row[:2] for row in rows] == [(step, name) for step in (3, 6) for name in ("eval", "eval_ema")]
    assert rows[2][2] < rows[0][2] and {row[3] for row in rows} == {359}
    assert evaluations(run).evaluations == [] and len(evaluations(run).few_shot) == 2
    assert losses(run)[-1] < losses(run)[0]
    reconstructions = read_reconstructions(RunFolder(run))
    assert (reconstructions.step, reconstructions.averaged, len(reconstructions.pictures)) == (6, True, 12)
    assert {picture.width for picture in reconstructions.pictures} == {3 * 8}
    state = find_checkpoint(str(run)).read_manifest().state
    assert state.accuracy["eval"]["top1"] is None and state.accuracy["eval"]["loss"] == rows[2][2]


@pytest.mark.parametrize(("processes", "stage"), [(2, 3), in_full(1, 3), in_full(2, 0), in_full(2, 1), in_full(2, 2)])
def test_losses_are_the_same_at_every_stage_and_on_any_number_of_processes(
    train, run, settings, few_shot, tmp_path, processes, stage
):
    own = [*settings, *few_shot, *at_stage(stage), "train.micro_batch_size=8"]
    other = train(tmp_path / "run", *own, processes=processes)
    assert losses(other) == pytest.approx(losses(run), abs=1e-5)
    for row, expected in zip(held_out(other), held_out(run), strict=True):
        assert row[:2] == expected[:2] and row[3] == expected[3]
        assert row[2] == pytest.approx(expected[2], abs=1e-5)
    assert [row["eval"] for row in evaluations(other).few_shot] == ["fewshot", "fewshot_ema"]


def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(train, run, settings, tmp_path):
    for duration in ("train.duration=3 steps", "train.duration=6 steps"):
        train(tmp_path / "run", *settings, *at_stage(0), duration, resume="auto")
    assert figures(tmp_path / "run") == figures(run)
    for kind in ("weight", "exp_avg", "ema"):
        ours, theirs = whole(tmp_path / "run", 6, kind), whole(run, 6, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), kind


def test_only_the_encoder_leaves_a_run(run):
    in_checkpoint = whole(run, 6)
    assert sum(map(is_for_pretraining, in_checkpoint)) > 10
    for name, kind in (("model", "weight"), ("model_ema", "ema")):
        exported = load_file(run / f"{name}.safetensors")
        model = load_model(run, ema=kind == "ema")
        assert list(model.state_dict()) == list(exported) == list(parameter_shapes(model.config))
        stored = whole(run, 6, kind)
        for key, tensor in exported.items():
            assert torch.equal(tensor.flatten(), stored[key]) and torch.equal(tensor, model.state_dict()[key])
    assert model.config == ModelConfig.model_validate({**model.config.model_dump(), "num_classes": 0, "pool": "gap"})


def test_another_decoder_or_mask_is_another_run(train_arguments, run, settings, capsys):
    arguments = train_arguments(run, *settings, "mae.mask_ratio=0.75", "train.duration=9 steps", resume="auto")
    assert main([*arguments, "--dry-run"]) == 2
    assert 'was written with mae {"mask_ratio": 0.5' in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["classify", in_full("mae")])
def test_runs_start_from_its_encoder(train, run, settings, tmp_path, objective):
    """Fine-tuning has a head of its own, and pretraining goes on with a decoder of its own."""
    own = ["train.objective=classify", "model.num_classes=10"] if objective == "classify" else []
    short = ["train.duration=1 step", "evaluate.every=null", "data.eval=null", f"init.from={run}", "seed=5"]
    other = train(tmp_path / "run", *settings, *own, *short)
    before = whole(other, 0)
    encoder = {name: value for name, value in whole(run, 6).items() if not is_for_pretraining(name)}
    assert all(torch.equal(before[name], value) for name, value in encoder.items())
    rest = before.keys() - encoder.keys()
    if objective == "classify":
        assert rest == {"head.weight", "head.bias"}
    else:
        assert rest == {name for name in whole(run, 6) if is_for_pretraining(name)}
        assert not torch.equal(before["mask_token"], whole(run, 6)["mask_token"])
    begun = json.loads((other / "environment.json").read_text())
    assert begun["init"]["from"] == str(run)


@only_in_full
@pytest.mark.parametrize("target", ["mean", "grid", "pixels"])
def test_masked_patch_prediction_is_the_same_sharded_over_two_processes(train, tmp_path, target):
    settings = [*MAE, "train.objective=masked_patch", f"masked_patch.target={target}", "evaluate.every=null"]
    alone = losses(train(tmp_path / "alone", *settings, *at_stage(0)))
    assert losses(train(tmp_path / "two", *settings, *at_stage(3), processes=2)) == pytest.approx(alone, abs=1e-5)
    assert alone[-1] < alone[0]
