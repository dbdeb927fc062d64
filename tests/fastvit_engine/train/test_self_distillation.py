"""Runs of DINO: the same on any number of processes and at every stage, and resumed to the bit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from fastvit_engine.cli import main
from fastvit_engine.models import is_for_pretraining
from tests.fastvit_engine.train.test_finetune import at_stage, losses, whole
from tests.in_full import in_full

pytestmark = pytest.mark.distributed

DINO = [
    "train.objective=dino",
    "model.num_classes=0",
    "dino.prototypes=32",
    "dino.projection_width=24",
    "dino.bottleneck=8",
    "dino.local_views=2",
    "dino.local_size=4",
    "ema.decay=0.8",
    "train.precision=fp32",
    "train.duration=6 steps",
    "train.global_batch_size=16",
    "schedule.kind=constant",
    "schedule.warmup=1 step",
    "optimizer.learning_rate=1e-2",
    "data.eval=null",
    "evaluate.every=null",
    "checkpoint.every=3 steps",
]
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("dino") / "run", *DINO, *at_stage(0))


def centre(run, step):
    """Joined from the parts that the processes have saved."""
    parts = {}
    for file in (run / "checkpoints" / f"step-{step:08d}").glob("rank-*.safetensors"):
        parts |= {int(name.rpartition("@")[2]): part for name, part in load_file(file).items() if "centre_bits" in name}
    return torch.cat([parts[start] for start in sorted(parts)]).view(torch.float32)


def test_the_student_learns_and_the_teacher_and_its_centre_follow(run):
    assert all(torch.isfinite(torch.tensor(losses(run)))) and len(losses(run)) == 6
    before, after = (
        {kind: torch.cat([*whole(run, step, kind).values()]) for kind in ("weight", "ema")} for step in (3, 6)
    )
    student, teacher = (after[kind] - before[kind] for kind in ("weight", "ema"))
    assert 0 < teacher.norm() < student.norm()
    assert (after["ema"] - after["weight"]).norm() < (before["ema"] - after["weight"]).norm()
    assert 0 < centre(run, 6).abs().max() < 1 and not torch.equal(centre(run, 3), centre(run, 6))


@pytest.mark.parametrize(("processes", "stage"), [(2, 3), in_full(1, 3), in_full(2, 0), in_full(2, 1), in_full(2, 2)])
def test_losses_are_the_same_at_every_stage_and_on_any_number_of_processes(train, run, tmp_path, processes, stage):
    """The second has several micro-batches per step, between which student and teacher change places."""
    other = train(tmp_path / "run", *DINO, *at_stage(stage), "train.micro_batch_size=4", processes=processes)
    assert losses(other) == pytest.approx(losses(run), abs=2e-5)
    torch.testing.assert_close(centre(other, 6), centre(run, 6), rtol=1e-4, atol=1e-5)
    ours, theirs = whole(other, 6, "ema"), whole(run, 6, "ema")
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-4) for name in theirs)


@pytest.mark.parametrize(("processes", "stage"), [(1, 0), in_full(2, 1), in_full(2, 2), in_full(2, 3)])
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(train, run, tmp_path, processes, stage):
    whole_run = run if (processes, stage) == (1, 0) else tmp_path / "whole"
    own = [*DINO, *at_stage(stage)]
    if whole_run != run:
        train(whole_run, *own, processes=processes)
    shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    train(tmp_path / "run", *own, processes=processes, resume="auto")
    for kind in KINDS:
        ours, theirs = whole(tmp_path / "run", 6, kind), whole(whole_run, 6, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), kind
    assert torch.equal(centre(tmp_path / "run", 6), centre(whole_run, 6))


@pytest.mark.parametrize("precision", [in_full("bf16")])
def test_the_centre_keeps_its_precision_where_the_model_has_16_bits(train, tmp_path, precision):
    found = centre(train(tmp_path / "run", *DINO, *at_stage(1), f"train.precision={precision}"), 6)
    assert not torch.equal(found, found.bfloat16().float())


def test_only_the_model_leaves_a_run(run):
    for name, kind in (("model", "weight"), ("model_ema", "ema")):
        exported, stored = load_file(run / f"{name}.safetensors"), whole(run, 6, kind)
        assert set(exported) == {key for key in stored if not is_for_pretraining(key)}
        assert all(torch.equal(tensor.flatten(), stored[key]) for key, tensor in exported.items())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["ema.decay=null"], "dino has the average of the weights for a teacher: set ema.decay"),
        (["data.eval=x"], "data.eval is set, and the loss of train.objective = dino says nothing of held-out images"),
        (["dino.local_size=6"], "dino.local_size is 6, which is no multiple of the patch size 4"),
        (["augment.randaugment_ops=2"], "distorts its views itself"),
        (["dino.prototypes=64"], 'was written with dino {"prototypes": 32'),
    ],
)
def test_what_makes_no_sense_is_refused(train_arguments, run, capsys, settings, sentence):
    arguments = train_arguments(run, *DINO, *at_stage(0), "train.duration=9 steps", *settings, resume="auto")
    assert main([*arguments, "--dry-run"]) == 2
    assert sentence in capsys.readouterr().err
