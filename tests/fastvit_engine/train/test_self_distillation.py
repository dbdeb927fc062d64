"""Runs of DINO: the same on any number of processes and at every stage, and resumed to the bit."""

import pytest
import torch
from safetensors.torch import load_file

from fastvit_engine.cli import main
from tests.fastvit_engine.train.taught_runs import RESUMED, TAUGHT, WORLDS, check_average, check_exports, check_resume
from tests.fastvit_engine.train.test_finetune import at_stage, losses, whole
from tests.in_full import in_full

pytestmark = pytest.mark.distributed

DINO = [
    *TAUGHT,
    "train.objective=dino",
    "dino.prototypes=32",
    "dino.projection_width=24",
    "dino.bottleneck=8",
    "dino.local_views=2",
    "dino.local_size=4",
    "train.global_batch_size=16",
    "optimizer.learning_rate=1e-2",
    "optimizer.eps=1e-6",  # the gradient of the keys' biases is rounding alone, which Adam would enlarge
]


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


@pytest.mark.parametrize(("processes", "stage"), WORLDS)
def test_losses_are_the_same_at_every_stage_and_on_any_number_of_processes(train, run, tmp_path, processes, stage):
    """The second has several micro-batches per step, between which student and teacher change places."""
    other = train(tmp_path / "run", *DINO, *at_stage(stage), "train.micro_batch_size=4", processes=processes)
    assert losses(other) == pytest.approx(losses(run), abs=2e-5)
    torch.testing.assert_close(centre(other, 6), centre(run, 6), rtol=1e-4, atol=1e-5)
    check_average(other, run)


def test_zero_3_reduces_gradients_of_views_of_both_sizes_together(train, run, tmp_path):
    """With DeepSpeed's own buckets, which have room for all gradients of a step."""
    assert losses(train(tmp_path / "run", *DINO, "zero.stage=3")) == pytest.approx(losses(run), abs=2e-5)


@pytest.mark.parametrize(("processes", "stage"), RESUMED)
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(train, run, tmp_path, processes, stage):
    resumed, uninterrupted = check_resume(train, run, tmp_path, DINO, processes, stage)
    assert torch.equal(centre(resumed, 6), centre(uninterrupted, 6))


@pytest.mark.parametrize("precision", [in_full("bf16")])
def test_the_centre_keeps_its_precision_where_the_model_has_16_bits(train, tmp_path, precision):
    found = centre(train(tmp_path / "run", *DINO, *at_stage(1), f"train.precision={precision}"), 6)
    assert not torch.equal(found, found.bfloat16().float())


def test_only_the_model_leaves_a_run(run):
    check_exports(run, extra="projection.")


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
