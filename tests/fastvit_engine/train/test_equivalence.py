"""The same run on other numbers of processes, at other ZeRO stages and in other precisions."""

import math

import pytest
from safetensors.torch import load_file

from fastvit_engine.observe.metrics import read_metrics
from fastvit_kernels import dispatch
from tests.fastvit_engine.warm_ranks import exit_codes_of
from tests.in_full import IN_FULL, in_full, only_in_full

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FEW = "train.duration=10 steps"
# Tiny parameters stay whole under ZeRO-3 by default, and buckets hold all of them: make the machinery work.
SHARD_EVERYTHING = "deepspeed.zero_optimization={stage3_param_persistence_threshold: 0, reduce_bucket_size: 5000}"


def rows(run):
    return read_metrics(run / "metrics.jsonl")[0]


@pytest.fixture(scope="module")
def reference(train, tmp_path_factory):
    return rows(train(tmp_path_factory.mktemp("reference") / "run", FEW, "train.precision=fp32", "zero.stage=0"))


def test_every_stage_and_world_size_gives_the_same_fp32_curve(train, reference, tmp_path):
    assert len(reference) == 10
    assert reference[-1]["loss"] < reference[0]["loss"]
    for world_size in (1, 2):
        for stage in (0, 1, 2, 3) if world_size > 1 or IN_FULL else (3,):
            settings = [FEW, "train.precision=fp32", f"zero.stage={stage}", "train.micro_batch_size=8"]
            if stage == 3:
                settings.append(SHARD_EVERYTHING)
            run = train(tmp_path / f"{world_size}-{stage}", *settings, processes=world_size)
            for expected, row in zip(reference, rows(run), strict=True):
                where = f"step {row['step']}, {world_size} processes, ZeRO-{stage}"
                assert row["samples_hash"] == expected["samples_hash"], where
                assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5), where
                assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2), where


@pytest.mark.parametrize("stage", [in_full(0), in_full(1), in_full(2), 3])
def test_bf16_trains_and_stays_near_fp32(train, reference, stage, tmp_path):
    settings = [FEW, "train.precision=bf16", f"zero.stage={stage}", "ema.decay=0.9"]
    bf16 = rows(train(tmp_path / "run", *settings, processes=2))
    assert bf16[-1]["loss"] < bf16[0]["loss"] - 0.5 * (reference[0]["loss"] - reference[-1]["loss"])
    for expected, row in zip(reference, bf16, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=0.03)


@pytest.mark.parametrize("offload", [in_full("optimizer"), "all"])
def test_offloading_to_host_memory_changes_nothing(train, reference, offload, tmp_path):
    run = train(tmp_path / "run", FEW, "train.precision=fp32", "zero.stage=3", f"zero.offload={offload}")
    assert [row["loss"] for row in rows(run)] == pytest.approx([row["loss"] for row in reference], abs=1e-5)


@pytest.mark.parametrize("stage", [in_full(0), in_full(1), in_full(2), 3])
def test_checkpointed_blocks_change_nothing(train, reference, stage, tmp_path):
    """To the bit at stage 0, as the same is computed again."""
    settings = [FEW, "train.precision=fp32", f"zero.stage={stage}", "train.activation_checkpointing=all"]
    run = rows(train(tmp_path / "run", *settings, *([SHARD_EVERYTHING] if stage == 3 else [])))
    assert [row["loss"] for row in run] == pytest.approx([row["loss"] for row in reference], abs=1e-5)
    if stage == 0:
        assert [row["loss"] for row in run] == [row["loss"] for row in reference]


@only_in_full
@pytest.mark.parametrize("stage", [0, 2])
def test_a_compiled_model_learns_the_same(train, reference, stage, tmp_path):
    """By PyTorch's C++ for this CPU, around the operations of the blocks."""
    run = rows(train(tmp_path / "run", FEW, "train.precision=fp32", f"zero.stage={stage}", "train.compile=true"))
    assert [row["loss"] for row in run] == pytest.approx([row["loss"] for row in reference], abs=1e-4)


def test_weight_average_and_exported_weights_are_the_same_at_every_stage(train, tmp_path):
    exported = {}
    for stage in (0, 2, 3):
        settings = ["train.precision=fp32", "optimizer.eps=1e-3", "ema.decay=0.9", f"zero.stage={stage}"]
        run = train(tmp_path / f"stage-{stage}", *settings, *([SHARD_EVERYTHING] if stage == 3 else []), processes=2)
        exported[stage] = {name: load_file(run / name) for name in ("model.safetensors", "model_ema.safetensors")}
    for stage in (2, 3):
        for name, weights in exported[stage].items():
            assert weights.keys() == exported[0][name].keys()
            for key, weight in weights.items():
                difference = (weight - exported[0][name][key]).abs().max().item()
                assert difference < 1e-5, f"{name} {key} at ZeRO-{stage}"
    gap = exported[0]["model.safetensors"]["head.weight"] - exported[0]["model_ema.safetensors"]["head.weight"]
    assert gap.abs().max() > 1e-4  # the average lags behind


@pytest.mark.parametrize(
    "settings",
    [
        ["loss.kind=sigmoid", "model.head_bias=-2", "model.head=mlp"],
        ["loss.label_smoothing=0.1", "augment.mixup=0.4", "model.pool=gap"],
        ["model.dropout=0.1", "model.drop_path=0.2", "model.layer_scale=0.1", "model.pool=map", "model.registers=2"],
    ],
)
def test_the_options_of_the_recipes_train(train, settings, tmp_path):
    losses = [row["loss"] for row in rows(train(tmp_path / "run", "train.precision=fp32", *settings))]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize(
    "positions",
    [
        ["model.pos_embed=relative"],
        ["model.pos_embed=learned_2d", "model.pos_embed_at=every_layer"],
        in_full(["model.pos_embed=learned", "model.pos_embed_at=shared"]),
        in_full(["model.pos_embed=none"]),
    ],
    ids=lambda settings: " ".join(setting.partition("=")[2] for setting in settings),
)
def test_position_tables_are_the_same_at_zero_0_and_3_also_after_resuming_at_the_other(train, positions, tmp_path):
    usual = [
        "train.precision=fp32",
        "schedule.kind=constant",
        "schedule.warmup=0 steps",
        "optimizer.eps=1e-3",
        *positions,
    ]
    stages = {"0": (["zero.stage=0"], 1), "3": (["zero.stage=3", SHARD_EVERYTHING], 2)}
    for first, then in (("0", "3"), ("3", "0")):
        for stage, steps in ((first, 4), (then, 6)):
            settings, processes = stages[stage]
            duration = f"train.duration={steps} steps"
            train(tmp_path / first, *usual, duration, *settings, processes=processes, resume="auto")
    expected, found = (load_file(tmp_path / stage / "model.safetensors") for stage in stages)
    assert expected.keys() == found.keys()
    for name, weights in expected.items():
        assert (weights - found[name]).abs().max() < 1e-5, name


@pytest.fixture(scope="module")
def curve_of(train, tmp_path_factory):
    """The rows of one process that takes the whole batch in one pass, by the settings of the run."""
    known = {}

    def measure(*settings):
        if settings not in known:
            known[settings] = rows(train(tmp_path_factory.mktemp("one") / "run", "zero.stage=0", *settings))
        return known[settings]

    return measure


MIXED = ["augment.mixup=0.4", "augment.cutmix=1.0"]


@pytest.mark.parametrize(
    ("processes", "stage", "batch", "micro_batch", "settings"),
    [
        in_full(2, 0, 33, 8, []),  # 17 and 16 images, in 3 passes
        in_full(3, 1, 32, 16, []),  # 11, 11 and 10 images, in 1
        in_full(3, 3, 32, 4, MIXED),  # 12, 10 and 10 images, in 3
        (5, 2, 33, 2, MIXED),  # 17 pairs, the last without a partner: 3 or 4 of them, in 4 passes, some of padding
        in_full(7, 3, 32, 3, []),  # 5 or 4 images, in 2
        (7, 0, 8, None, MIXED),  # 4 pairs: three processes have none
    ],
)
def test_shares_that_differ_train_the_mean_over_the_global_batch(
    train, curve_of, tmp_path, processes, stage, batch, micro_batch, settings
):
    common = ["train.precision=fp32", f"train.global_batch_size={batch}", "train.duration=6 steps", *settings]
    common += ["schedule.warmup=1 step", "schedule.kind=constant"]
    own = [f"zero.stage={stage}", *([SHARD_EVERYTHING] if stage == 3 else [])]
    own += [] if micro_batch is None else [f"train.micro_batch_size={micro_batch}"]
    run = rows(train(tmp_path / "run", *common, *own, processes=processes))
    for expected, row in zip(curve_of(*common), run, strict=True):
        assert (row["samples_hash"], row["samples"]) == (expected["samples_hash"], batch * row["step"])
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_a_run_that_loses_a_process_and_gets_it_back_has_the_same_ledger(train, curve_of, tmp_path):
    """32 images on 3 processes, on 2, and on 3 again."""
    common = ["train.precision=fp32", "schedule.warmup=1 step", "schedule.kind=constant", *MIXED]
    expected = curve_of(*common, "train.duration=12 steps")
    out = tmp_path / "run"
    for steps, processes in ((4, 3), (8, 2), (12, 3)):
        length = [f"train.duration={steps} steps", "zero.stage=2", "train.micro_batch_size=4"]
        train(out, *common, *length, processes=processes, resume="auto")
    assert [row["samples_hash"] for row in rows(out)] == [row["samples_hash"] for row in expected]
    assert [row["loss"] for row in rows(out)] == pytest.approx([row["loss"] for row in expected], abs=1e-5)
    assert {row["samples"] for row in rows(out)} == {32 * step for step in range(1, 13)}


@pytest.mark.parametrize(("processes", "batch"), [(3, 32), in_full(2, 32)])
def test_a_resumed_run_repeats_the_uninterrupted_one_whatever_its_shares(train, tmp_path, processes, batch):
    """To the bit."""
    common = ["train.precision=fp32", "schedule.warmup=1 step", "schedule.kind=constant", "model.dropout=0.1", *MIXED]
    common += ["zero.stage=2", "train.micro_batch_size=4", f"train.global_batch_size={batch}"]
    whole = train(tmp_path / "whole", *common, "train.duration=8 steps", processes=processes)
    for steps in (5, 8):
        length = f"train.duration={steps} steps"
        train(tmp_path / "run", *common, length, processes=processes, resume="auto")
    for expected, row in zip(rows(whole), rows(tmp_path / "run"), strict=True):
        same = ("step", "samples", "loss", "grad_norm", "samples_hash")
        assert [row[name] for name in same] == [expected[name] for name in same]


def test_mixed_and_augmented_images_do_not_depend_on_the_world_size(train, tmp_path):
    settings = ["train.precision=fp32", "train.micro_batch_size=8", "augment.mixup=0.4", "augment.cutmix=1.0"]
    settings += ["augment.randaugment_ops=2", "train.duration=8 steps", "schedule.warmup=1 step"]
    one, two = (rows(train(tmp_path / str(n), *settings, processes=n)) for n in (1, 2))
    assert [row["samples_hash"] for row in one] == [row["samples_hash"] for row in two]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=1e-5)


def test_torchrun_starts_the_same_run(train_command, execute, reference, tmp_path):
    command = train_command(tmp_path / "run", FEW, "train.precision=fp32", "zero.stage=2")
    module = command.index("-m")
    torchrun = [command[0], "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command[module:]]
    done = execute(torchrun)
    assert done.returncode == 0, done.stderr
    assert [row["loss"] for row in rows(tmp_path / "run")] == pytest.approx(
        [row["loss"] for row in reference], abs=1e-5
    )


def take_triton_kernels():
    """As FASTVIT_KERNELS=triton does in a process that starts."""
    import tests.kernels.conftest  # noqa: F401 - makes the interpreter faster

    dispatch.use("triton")


@pytest.mark.parametrize("stage", [in_full(1), 3])
def test_triton_kernels_follow_the_same_curve(train, train_arguments, tmp_path, stage):
    """Every layer runs its Triton kernels, forward and backward, under Triton's interpreter."""
    settings = ["train.precision=fp32", f"zero.stage={stage}", "train.duration=6 steps", "train.global_batch_size=8"]
    settings += ["model.depth=1", "schedule.warmup=1 step", "schedule.kind=constant"]
    expected = rows(train(tmp_path / "plain", *settings))
    log, arguments = tmp_path / "log", train_arguments(tmp_path / "kernels", *settings)
    assert exit_codes_of(arguments, 1, log, before=take_triton_kernels) == [0], log.read_text()
    measured = rows(tmp_path / "kernels")
    assert [row["samples_hash"] for row in measured] == [row["samples_hash"] for row in expected]
    assert [row["loss"] for row in measured] == pytest.approx([row["loss"] for row in expected], abs=1e-4)
    assert measured[-1]["loss"] < measured[0]["loss"]
    norms = [[row["grad_norm"] for row in of_run] for of_run in (measured, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[0] != norms[1]  # not the same arithmetic; losses may be equal by chance
