"""What the tests of objectives with a teacher share: the settings of their runs, and what must hold of every one."""

import shutil

import torch
from safetensors.torch import load_file

from fastvit_engine.models import is_for_pretraining
from tests.fastvit_engine.train.test_finetune import at_stage, whole
from tests.in_full import in_full

TAUGHT = [
    "model.num_classes=0",
    "ema.decay=0.8",
    "train.precision=fp32",
    "train.duration=6 steps",
    "schedule.kind=constant",
    "schedule.warmup=1 step",
    "data.eval=null",
    "evaluate.every=null",
    "checkpoint.every=3 steps",
]
WORLDS = [(2, 3), in_full(1, 3), in_full(2, 0), in_full(2, 1), in_full(2, 2)]  # processes and ZeRO stage
RESUMED = [(1, 0), in_full(2, 1), in_full(2, 2), in_full(2, 3)]


def check_average(one, other):
    """The teachers of two runs are the same, within rounding."""
    ours, theirs = whole(one, 6, "ema"), whole(other, 6, "ema")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-4) for name in theirs)


def check_resume(train, alone, folder, settings, processes, stage):
    """A run that resumes from step 3 is the uninterrupted one to the bit. Returns both.

    alone: the uninterrupted run of one process at stage 0.
    """
    own, resumed = [*settings, *at_stage(stage)], folder / "run"
    uninterrupted = alone if (processes, stage) == (1, 0) else train(folder / "whole", *own, processes=processes)
    shutil.copytree(uninterrupted, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000006")
    train(resumed, *own, processes=processes, resume="auto")
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        ours, theirs = whole(resumed, 6, kind), whole(uninterrupted, 6, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), kind
    return resumed, uninterrupted


def check_exports(run, extra):
    """Student and teacher leave a run without what is for pretraining alone; of that it has parameters `extra`."""
    for name, kind in (("model", "weight"), ("model_ema", "ema")):
        exported, stored = load_file(run / f"{name}.safetensors"), whole(run, 6, kind)
        assert set(exported) == {key for key in stored if not is_for_pretraining(key)}
        assert any(key.startswith(extra) for key in stored)
        assert all(torch.equal(tensor.flatten(), stored[key]) for key, tensor in exported.items())
