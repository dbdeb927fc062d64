"""Runs with `train.precision: fp8`, emulated on the CPU: near those in bf16, the same however they are sharded, and
back to bf16 where scales are out of range."""

import signal
from functools import partial

import pytest
import torch

from fastvit_engine.checkpoint import Checkpoint, open_store
from fastvit_engine.checkpoint.trainer_state import Fp8State
from fastvit_engine.observe.events import read_events
from fastvit_engine.observe.run_folder import RunFolder
from tests.fastvit_engine.train import ill_fated_rank
from tests.fastvit_engine.train.test_finetune import at_stage, figures, losses, whole
from tests.fastvit_engine.warm_ranks import exit_codes_of
from tests.in_full import in_full

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SHORT = ["train.duration=8 steps", "schedule.kind=constant", "schedule.warmup=1 step", "optimizer.learning_rate=3e-3"]
FP8 = ["train.precision=fp8", "train.fp8.emulate=true"]


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    """The losses of one process without ZeRO, by the settings of the run."""
    known = {}

    def measure(*settings):
        if settings not in known:
            run = train(tmp_path_factory.mktemp("alone") / "run", *SHORT, *at_stage(0), *settings)
            known[settings] = losses(run)
        return known[settings]

    return measure


@pytest.mark.parametrize("scaling", ["tensor", in_full("row")])
def test_losses_are_near_those_in_bf16(alone, scaling):
    """And not the same: something is in FP8. That training converges alike is shown in kernels/test_fp8_training.py."""
    plain, ours = alone("train.precision=bf16"), alone(*FP8, f"train.fp8.scaling={scaling}")
    assert ours != plain
    assert ours == pytest.approx(plain, rel=0.03)


WORLDS = [(1, 3), (2, 1), in_full(1, 1), in_full(1, 2), in_full(2, 0), in_full(2, 2), in_full(2, 3)]


@pytest.mark.parametrize(("processes", "stage"), WORLDS)
def test_losses_are_the_same_at_every_stage(train, alone, tmp_path, processes, stage):
    """On one process to a few roundings of bf16; several also have other matrices, hence other scales."""
    run = train(tmp_path / "run", *SHORT, *FP8, *at_stage(stage), processes=processes)
    assert losses(run) == pytest.approx(alone(*FP8), rel=0.03 if processes > 1 else 0.01)


def test_what_is_in_fp8_is_said(train_command, execute, tmp_path):
    settings = [*SHORT, *FP8, "train.duration=1 step", "train.fp8.bf16_first_blocks=1", "train.fp8.layers=[fc1, fc2]"]
    found = execute(train_command(tmp_path / "run", *settings, *at_stage(0)))
    assert "FP8: fc1, fc2 of 1 block (1 to 1), a scale per matrix; all else in bf16" in found.stdout, found.stderr


VANISHING = [
    *FP8,
    "train.objective=tests.fastvit_engine.train.vanishing:Vanishing",
    "optimizer.eps=1e-20",
    "train.fp8.fallback_after=4",
    "train.fp8.bf16_last_blocks=1",
    "health.spike_threshold=null",
    "checkpoint.every=3 steps",
    "checkpoint.keep=9",
]


@pytest.fixture(scope="module")
def vanishing(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("vanishing") / "run", *SHORT, *VANISHING, *at_stage(1), processes=2)


def fallbacks(run):
    return [event for event in read_events(RunFolder(run)) if event["event"] == "fp8_fallback"]


def test_layers_whose_scales_are_out_of_range_return_to_bf16_once(vanishing):
    """The head is 0 at first, and so are all gradients in the first step; in the others they are too small."""
    (event,) = fallbacks(vanishing)
    assert event["step"] == 5
    assert event["layers"] == [f"blocks.0.{layer}" for layer in ("qkv", "proj", "fc1", "fc2")]
    assert (
        "leave FP8 after step 5 and continue in bf16: scales were out of range in 4 steps in a row" in event["message"]
    )
    assert state_at(vanishing, 3) == Fp8State((), dict.fromkeys(event["layers"], 2))
    assert state_at(vanishing, 6) == state_at(vanishing, 8) == Fp8State(tuple(event["layers"]), {})


def state_at(run, step):
    return Checkpoint(open_store(str(run / "checkpoints")), f"step-{step:08d}").read_manifest().state.fp8


@pytest.mark.parametrize("killed_after", [4, in_full(7)])
def test_a_killed_run_falls_back_at_the_same_step_and_to_the_same_bits(
    train, train_arguments, vanishing, killed_after, tmp_path
):
    """Before and after it has fallen back."""
    run, settings = tmp_path / "run", [*SHORT, *VANISHING, *at_stage(1)]
    codes = exit_codes_of(
        train_arguments(run, *settings), 2, tmp_path / "log", before=partial(ill_fated_rank.after_step, killed_after)
    )
    assert -signal.SIGKILL in codes
    train(run, *settings, processes=2, resume="auto")
    assert figures(run) == figures(vanishing)
    assert {event["step"] for event in fallbacks(run)} == {5}
    ours, theirs = whole(run, 8), whole(vanishing, 8)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
