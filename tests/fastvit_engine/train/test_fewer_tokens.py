"""Runs with dropped patches, smaller images at first, and subsets of samples: the same however they are computed."""

import json
import signal
from functools import partial

import pytest
import torch

from fastvit_engine.observe.metrics import read_all_metrics
from tests.fastvit_engine.train import ill_fated_rank
from tests.fastvit_engine.train.test_finetune import at_stage, figures, losses, rows, whole
from tests.fastvit_engine.warm_ranks import exit_codes_of
from tests.in_full import in_full

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

USUAL = [
    "train.precision=fp32",
    "train.duration=9 steps",
    "schedule.kind=constant",
    "schedule.warmup=1 step",
    "optimizer.learning_rate=3e-3",
    "optimizer.eps=1e-3",
    "model.image_size=16",
]
PHASES = [
    *USUAL,
    "tokens.image_sizes=[[8, 3 steps], [12, 6 steps]]",
    "tokens.patch_drop=0.5",
    "tokens.patch_drop_until=8 steps",
]


@pytest.fixture(scope="module")
def run(train, digits, tmp_path_factory):
    evaluation = [f"data.eval={digits}/eval-*.tar", "evaluate.every=3 steps"]
    return train(tmp_path_factory.mktemp("phases") / "run", *PHASES, *evaluation, *at_stage(0))


def test_each_step_is_counted_as_it_is_computed(run):
    environment = json.loads((run / "environment.json").read_text())
    phases = environment["phases"]
    assert [(phase["first_step"], phase["image_size"], phase["patch_drop"]) for phase in phases] == [
        (0, 8, 0.5),
        (3, 12, 0.5),
        (6, 16, 0.5),
        (8, 16, 0.0),
    ]
    costs = [phase["training_flops_per_image"] for phase in phases]
    assert costs == sorted(set(costs))
    expected = [32 * cost for cost, steps in zip(costs, (3, 3, 2, 1), strict=True) for _ in range(steps)]
    assert [row["flops"] for row in rows(run)] == [sum(expected[:done]) for done in range(1, 10)]
    for row, before, cost in zip(rows(run)[1:], rows(run), expected[1:], strict=False):
        seconds = row["seconds"] - before["seconds"]
        assert row["mfu"] == pytest.approx(cost / seconds / environment["peak_flops"], rel=1e-6)
    assert [row["samples"] for row in read_all_metrics(run / "metrics.jsonl").evaluations] == [359] * 3


@pytest.mark.parametrize("killed_after", [5, in_full(3)])
def test_a_killed_run_repeats_the_uninterrupted_one_to_the_bit(
    train, train_arguments, run, digits, killed_after, tmp_path
):
    """From the middle of a phase on, across the changes that follow; data workers are ahead of the training."""
    settings = [*PHASES, f"data.eval={digits}/eval-*.tar", "evaluate.every=3 steps", *at_stage(0)]
    settings += ["checkpoint.every=2 steps", "data.num_workers=2"]
    arguments = train_arguments(tmp_path / "run", *settings)
    codes = exit_codes_of(arguments, 1, tmp_path / "log", before=partial(ill_fated_rank.after_step, killed_after))
    assert codes == [-signal.SIGKILL]
    first = int((tmp_path / "run" / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert 0 < first < killed_after
    train(tmp_path / "run", *settings, resume="auto")
    assert figures(tmp_path / "run") == figures(run)
    assert [row["flops"] for row in rows(tmp_path / "run")] == [row["flops"] for row in rows(run)]
    for kind in ("weight", "exp_avg"):
        ours, theirs = whole(tmp_path / "run", 9, kind), whole(run, 9, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), kind


@pytest.mark.parametrize(
    ("processes", "stage", "settings"),
    [
        (2, 3, ["train.micro_batch_size=7"]),  # micro-batches differ in size
        in_full(2, 0, []),
        in_full(2, 1, ["train.micro_batch_size=4"]),
        in_full(2, 2, []),
        in_full(1, 3, ["train.micro_batch_size=5"]),
    ],
)
def test_losses_are_the_same_at_every_stage_and_on_any_number_of_processes(
    train, run, tmp_path, processes, stage, settings
):
    other = train(tmp_path / "run", *PHASES, *settings, *at_stage(stage), processes=processes)
    assert losses(other) == pytest.approx(losses(run), abs=1e-5)
    assert [row["samples_hash"] for row in rows(other)] == [row["samples_hash"] for row in rows(run)]


@pytest.mark.parametrize(
    "model",
    [
        ["model.pos_embed=sincos_2d", "model.pool=gap"],
        in_full(["model.pos_embed=learned_2d", "model.pos_embed_at=every_layer", "model.registers=2"]),
        in_full(["model.pool=map", "augment.cutmix=1.0", "augment.mixup=0.2"]),
        in_full(["model.pos_embed=none"]),
    ],
    ids=lambda settings: " ".join(setting.partition("=")[2] for setting in settings),
)
def test_other_models_learn_in_phases_too(train, model, tmp_path):
    """The kernels, in the interpreter, compute what plain layers do; shards are read as streams."""
    usual = [*PHASES, *model, "train.duration=9 steps", "data.order=stream", "data.streams=2"]
    plain = train(tmp_path / "plain", *usual, *at_stage(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVIT_KERNELS", "triton")
        fused = train(tmp_path / "fused", *usual, *at_stage(0))
    assert losses(fused) == pytest.approx(losses(plain), abs=1e-4)
    assert [row["flops"] for row in rows(fused)] == [row["flops"] for row in rows(plain)]


def test_subsets_of_samples_are_dropped_the_same_in_a_resumed_run(train, tmp_path):
    settings = [*USUAL, "model.drop_path=0.5", "model.drop_path_mode=subset", "checkpoint.every=4 steps", *at_stage(0)]
    run = train(tmp_path / "whole", *settings)
    train(tmp_path / "run", *settings, "train.duration=4 steps")
    train(tmp_path / "run", *settings, resume="auto")
    assert figures(tmp_path / "run") == figures(run)
    sharded = train(tmp_path / "sharded", *settings, *at_stage(3))
    assert losses(sharded) == pytest.approx(losses(run), abs=1e-5)
    masked = train(tmp_path / "masked", *settings, "model.drop_path_mode=mask")
    assert losses(masked) != losses(run)
    assert rows(run)[-1]["flops"] < rows(masked)[-1]["flops"]
