"""Runs of MoCo v3: the same on any number of processes and at every stage, and resumed to the bit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from fastvit_engine.cli import main
from fastvit_engine.models import is_for_pretraining
from tests.fastvit_engine.train.test_finetune import at_stage, losses, whole
from tests.in_full import in_full

pytestmark = pytest.mark.distributed

MOCO = [
    "train.objective=moco",
    "model.num_classes=0",
    "moco.hidden_width=24",
    "moco.outputs=8",
    "ema.decay=0.8",
    "train.precision=fp32",
    "train.duration=6 steps",
    "train.global_batch_size=17",  # which two processes do not share equally
    "schedule.kind=constant",
    "schedule.warmup=1 step",
    "optimizer.learning_rate=1e-3",
    "data.eval=null",
    "evaluate.every=null",
    "checkpoint.every=3 steps",
]
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
PATCHES = ("patch_embed.proj.weight", "patch_embed.proj.bias")


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("moco") / "run", *MOCO, *at_stage(0))


def test_the_student_learns_all_but_its_patches_and_the_teacher_follows(run):
    assert all(torch.isfinite(torch.tensor(losses(run)))) and len(losses(run)) == 6
    before, after = ({kind: whole(run, step, kind) for kind in ("weight", "ema")} for step in (3, 6))
    for kind in ("weight", "ema"):
        kept = {name for name, weight in after[kind].items() if torch.equal(weight, before[kind][name])}
        assert kept == set(PATCHES)
    student, teacher = (
        torch.cat([after[kind][name] - before[kind][name] for name in after[kind]]) for kind in ("weight", "ema")
    )
    assert 0 < teacher.norm() < student.norm()


@pytest.mark.parametrize(("processes", "stage"), [(2, 3), in_full(1, 3), in_full(2, 0), in_full(2, 1), in_full(2, 2)])
def test_losses_are_the_same_at_every_stage_and_on_any_number_of_processes(train, run, tmp_path, processes, stage):
    other = train(tmp_path / "run", *MOCO, *at_stage(stage), processes=processes)
    assert losses(other) == pytest.approx(losses(run), abs=2e-5)
    ours, theirs = whole(other, 6, "ema"), whole(run, 6, "ema")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-4) for name in theirs)


@pytest.mark.parametrize(("processes", "stage"), [(1, 0), in_full(2, 1), in_full(2, 2), in_full(2, 3)])
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(train, run, tmp_path, processes, stage):
    whole_run = run if (processes, stage) == (1, 0) else tmp_path / "whole"
    own = [*MOCO, *at_stage(stage)]
    if whole_run != run:
        train(whole_run, *own, processes=processes)
    shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    train(tmp_path / "run", *own, processes=processes, resume="auto")
    for kind in KINDS:
        ours, theirs = whole(tmp_path / "run", 6, kind), whole(whole_run, 6, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), kind


@pytest.mark.parametrize(("processes", "stage"), [in_full(2, 1), in_full(2, 3)])
def test_it_trains_in_16_bits(train, run, tmp_path, processes, stage):
    other = train(tmp_path / "run", *MOCO, *at_stage(stage), "train.precision=bf16", processes=processes)
    assert losses(other) == pytest.approx(losses(run), abs=0.05)


def test_only_the_model_leaves_a_run(run):
    for name, kind in (("model", "weight"), ("model_ema", "ema")):
        exported, stored = load_file(run / f"{name}.safetensors"), whole(run, 6, kind)
        assert set(exported) == {key for key in stored if not is_for_pretraining(key)}
        assert any(key.startswith("predictor.") for key in stored)
        assert all(torch.equal(tensor.flatten(), stored[key]) for key, tensor in exported.items())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["ema.decay=null"], "moco has the average of the weights for a teacher: set ema.decay"),
        (["data.eval=x"], "data.eval is set, and the loss of train.objective = moco says nothing of held-out images"),
        (["augment.randaugment_ops=2"], "distorts its views itself"),
        (["train.global_batch_size=1"], "tells images apart: set it to 2 or more"),
        (["train.micro_batch_size=8"], "moco normalises and compares all images of a step at once. Set it to null"),
        (["moco.outputs=16"], 'was written with moco {"outputs": 8'),
    ],
)
def test_what_makes_no_sense_is_refused(train_arguments, run, capsys, settings, sentence):
    arguments = train_arguments(run, *MOCO, *at_stage(0), "train.duration=9 steps", *settings, resume="auto")
    assert main([*arguments, "--dry-run"]) == 2
    assert sentence in capsys.readouterr().err
