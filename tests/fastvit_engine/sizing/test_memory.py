import json
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastvit_engine.config import Config, OptimizerConfig
from fastvit_engine.data import Batch
from fastvit_engine.models import build_for_training, build_vit, parameter_count
from fastvit_engine.objectives import build_objective
from fastvit_engine.sizing.activations import activation_bytes, block_bytes_a_token, block_implementation
from fastvit_engine.sizing.gathers import LIVE, PREFETCH, REUSE, Limits, left_whole, units_of
from fastvit_engine.sizing.memory import training_memory
from fastvit_engine.sizing.parameters import ParameterCounts, learning_model
from fastvit_engine.sizing.state import Buckets, state_memory
from fastvit_kernels import FusedCrossEntropy, dispatch
from tests.fastvit_engine.warm_rank import run_program
from tests.fastvit_engine.warm_ranks import exit_codes_of
from tests.in_full import IN_FULL, in_full

MEASURED_MODEL = {"name": "Ti/16", "image_size": 32, "num_classes": 10, "depth": 2}  # that of state_bytes.py
REDUCE = 50_000
SGD, PROBE = {"kind": "sgd"}, {"frozen": "backbone"}
OTHERS = [  # precision and stage, and another optimizer
    (("bf16", 0), SGD),
    (("bf16", 2), PROBE),
    (("fp32", 3), PROBE),
    (("fp32", 1), SGD),
    (("bf16", 3), SGD),
    (("bf16", 0), PROBE),
    (("bf16", 3), PROBE),
    (("fp32", 1), {"kind": "lion"}),
    (("fp32", 3), {"kind": "lamb"}),
    *((at, {"kind": kind}) for kind in ("muon", "adafactor") for at in (("fp32", 1), ("bf16", 0), ("bf16", 2))),
]


def vit(**model):
    return Config.model_validate({"model": model}).model


@contextmanager
def kept_by_autograd(model):
    """Every storage that is saved for the backward pass during the block, and is no parameter, by its address."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def state(stage, precision, world_size, frozen="none", **settings):
    given = {
        "offload": "none",
        "accumulate_bytes": 4 if stage or precision == "fp32" else 2,
        "accumulates": True,
        "average": False,
        "buckets": Buckets(reduce=REDUCE),
        "on_gpu": False,
    }
    counts = ParameterCounts.of(vit(**MEASURED_MODEL), frozen=frozen)
    return state_memory(counts, precision, stage, world_size, **given | settings)


@pytest.mark.distributed
def test_the_state_is_what_deepspeed_allocates(tmp_path):
    """Two processes, every kind of state: all tensors there are before the second optimizer step."""
    stages = {"fp32": (1, 3), "bf16": (0, 1, 2, 3)}
    cases = [
        {"precision": precision, "stage": stage, "reduce": REDUCE, "optimizer": {}}
        for precision, tried in stages.items()
        for stage in tried
    ]
    others = OTHERS if IN_FULL else OTHERS[:2]
    cases += [
        {**case, "optimizer": own} for case in cases for at, own in others if (case["precision"], case["stage"]) == at
    ]
    program, log = Path(__file__).with_name("state_bytes.py").read_text(), tmp_path / "log"
    run = partial(run_program, program, json.dumps(cases))
    assert exit_codes_of([], 2, log, before=run) == [0, 0], log.read_text()
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("measured ")]
    figures = json.loads(line.removeprefix("measured "))
    for case, measured in zip(cases, figures[::2], strict=True):
        chosen = OptimizerConfig(**case["optimizer"])
        model = learning_model(vit(**MEASURED_MODEL), chosen.frozen, None)
        kept = left_whole(units_of(model, persistence=0), Limits(PREFETCH, LIVE, REUSE)) if case["stage"] == 3 else 0
        settings = {"optimizer": chosen, "buckets": Buckets(reduce=REDUCE, gathered=kept)}
        computed = state(case["stage"], case["precision"], 2, chosen.frozen, **settings).state
        assert computed == pytest.approx(measured, rel=0.04), case


# So that blocks keep as much as the state needs, and more when the forward pass ends than one of them afterwards.
DEEPER = {"image_size": 224, "depth": 4, "pool": "gap"}
WHOLE = [  # precision, stage, and what is not as usual
    *((precision, stage, {}) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)),
    ("bf16", 1, {"average": True}),
    ("fp32", 3, {"average": True}),
    ("fp32", 1, {"optimizer": {"kind": "lion"}}),
    *(("bf16", stage, {"offload": "optimizer"}) for stage in (1, 2, 3)),
    ("bf16", 3, {"offload": "all"}),
    *(("fp32", stage, {"model": DEEPER}) for stage in (1, 3)),
    *(("fp32", stage, {"model": DEEPER, "checkpointed": 1}) for stage in (0, 1, 2, 3)),
    *(("bf16", stage, {"model": DEEPER, "checkpointed": 2}) for stage in (0, 1, 2, 3)),
]


@pytest.mark.distributed
def test_the_whole_is_within_a_tenth_of_what_is_allocated(tmp_path):
    """Two processes, when the forward pass has ended: state and activations. Host and device are the same here."""
    tried = WHOLE if IN_FULL else WHOLE[3::4]
    cases = [{"precision": p, "stage": s, "reduce": REDUCE, "optimizer": {}, **more} for p, s, more in tried]
    program, log = Path(__file__).with_name("state_bytes.py").read_text(), tmp_path / "log"
    run = partial(run_program, program, json.dumps(cases))
    assert exit_codes_of([], 2, log, before=run) == [0, 0], log.read_text()
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("measured ")]
    for case, measured in zip(cases, json.loads(line.removeprefix("measured "))[1::2], strict=True):
        config = Config.model_validate(
            {
                "model": MEASURED_MODEL | case.get("model", {}),
                "train": {"precision": case["precision"], "activation_checkpointing": case.get("checkpointed", 0)},
                "zero": {"stage": case["stage"], "offload": case.get("offload", "none")},
                "optimizer": case["optimizer"],
                "ema": {"decay": 0.9 if case.get("average") else None},
            }
        )
        # DeepSpeed's default keeps a model of this size gathered.
        gathered = parameter_count(config.model) if case["stage"] == 3 else 0
        buckets = Buckets(reduce=REDUCE, gathered=gathered)
        memory = training_memory(config, case["stage"], 2, 2, True, buckets, on_gpu=False)
        computed = memory.state + memory.activations + memory.host
        print(case, computed / measured)
        assert computed == pytest.approx(measured, rel=0.1), case


@pytest.mark.parametrize("world_size", [1, 7, 64])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_sharding_divides(precision, world_size):
    parameters = parameter_count(vit(**MEASURED_MODEL))
    compute = 4 if precision == "fp32" else 2
    share = -(-parameters // world_size)
    stages = [state(stage, precision, world_size) for stage in (0, 1, 2, 3)]
    assert [s.weights for s in stages] == [compute * parameters] * 3 + [compute * share]
    assert [s.optimizer for s in stages] == [(8 if compute == 4 else 12) * parameters] + [12 * share] * 3
    assert stages[3].gradients == 4 * share


def test_a_moving_average_is_sharded_with_the_optimizer():
    parameters = parameter_count(vit(**MEASURED_MODEL))
    averages = [state(stage, "bf16", 2, average=True).average for stage in (0, 1, 2, 3)]
    assert averages == [4 * parameters] + [4 * -(-parameters // 2)] * 3


def test_offloading_moves_the_optimizer_to_the_host():
    kept = state(2, "bf16", 4, average=True)
    moved = state(2, "bf16", 4, average=True, offload="optimizer")
    assert (moved.optimizer, moved.average, moved.weights) == (0, 0, kept.weights)
    assert moved.host >= kept.optimizer + kept.average
    everything = state(3, "bf16", 4, offload="all")
    assert everything.weights == 0
    assert everything.host >= state(3, "bf16", 4).weights + state(3, "bf16", 4).optimizer


def test_sgd_needs_one_moment_less_and_a_frozen_backbone_none():
    model = vit(**MEASURED_MODEL)
    parameters, head = parameter_count(model), 192 * 10 + 10
    assert state(0, "fp32", 1, optimizer=OptimizerConfig(kind="sgd")).optimizer == 4 * parameters
    assert state(0, "bf16", 1, optimizer=OptimizerConfig(kind="sgd", momentum=0)).optimizer == 4 * parameters
    probe = state(0, "bf16", 1, "backbone")
    assert (probe.optimizer, probe.gradients) == (4 * parameters + 8 * head, 2 * head)
    assert probe.weights == state(0, "bf16", 1).weights

    def of_step(frozen):
        config = Config.model_validate({"model": MEASURED_MODEL, "optimizer": {"frozen": frozen}})
        return training_memory(config, 0, 1, 8, False, Buckets(), on_gpu=False)

    assert of_step("backbone").activations < of_step("none").activations / 4


@pytest.mark.parametrize(("recompute", "expected"), [("none", 41_040), ("gelu", 30_800), ("all", 25_680)])
def test_fused_blocks_keep_what_their_documentation_says(recompute, expected):
    """kernels/README.md, measured there: D = 1280, 16 heads, M = 5120, bfloat16."""
    assert block_bytes_a_token(1280, 16, 5120, 2, "fused", recompute=recompute) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "model",
    [
        {"dropout": 0.0},
        {"dropout": 0.1, "num_classes": 1000},
        {"layer_scale": 1e-4},
        {"pool": "map"},
        {"pos_embed": "learned_2d", "pos_embed_at": "every_layer"},
        {"pos_embed": "relative"},
        {"pos_embed": "relative", "pool": "gap"},
    ],
)
def test_activations_are_what_autograd_keeps(precision, model):
    """Plain PyTorch, on the CPU: every storage saved for the backward pass that is no parameter."""
    config = vit(**{"name": "Ti/16", "image_size": 112, "depth": 3, **model})
    built = build_vit(config, mean=(0.5,) * 3, std=(0.5,) * 3)
    built = built.bfloat16() if precision == "bf16" else built
    images = torch.zeros(3, 112, 112, 3, dtype=torch.uint8)
    with kept_by_autograd(built) as kept:
        loss = FusedCrossEntropy()(built.train()(images), torch.zeros(3, dtype=torch.int64))  # noqa: F841 - holds them
        measured = sum(storage.nbytes() for storage in kept.values()) / 3
    assert activation_bytes(config, precision, "reference") == pytest.approx(measured, rel=0.05)


def allocated(function):
    """Bytes that PyTorch has allocated when the function is done, and at the most, beside what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()  # noqa: F841 - holds them
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    totals = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return totals[-1], max(totals)


@pytest.mark.parametrize(("pool", "checkpointed"), [("gap", 1), ("cls", 2), in_full("gap", 3), in_full("cls", 1)])
def test_checkpointed_blocks_keep_their_input(pool, checkpointed):
    """Plain PyTorch, on the CPU, as above; but for the pixels, which are there before."""
    config = vit(name="Ti/16", image_size=112, depth=4, pool=pool)
    built = build_vit(config, mean=(0.5,) * 3, std=(0.5,) * 3).train()
    built.checkpoint_blocks(checkpointed)
    images, labels = torch.zeros(3, 112, 112, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    kept, _ = allocated(lambda: FusedCrossEntropy()(built(images), labels))
    expected = activation_bytes(config, "fp32", "reference", checkpointed=checkpointed) - 3 * 112**2
    assert expected == pytest.approx(kept / 3, rel=0.02)
    assert expected < activation_bytes(config, "fp32", "reference") * (1 - 0.2 * checkpointed)


def test_the_backward_pass_of_a_checkpointed_block_needs_what_the_block_would_have_kept():
    config = vit(name="Ti/16", image_size=112, depth=4, pool="gap")
    built = build_vit(config, mean=(0.5,) * 3, std=(0.5,) * 3).train()
    built.checkpoint_blocks(4)
    for parameter in built.parameters():
        parameter.grad = torch.zeros_like(parameter)
    images, labels = torch.zeros(3, 112, 112, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    _, most = allocated(lambda: FusedCrossEntropy()(built(images), labels).backward())
    run = Config.model_validate({"model": config.model_dump(), "train": {"activation_checkpointing": "all"}})
    run = run.model_copy(update={"train": run.train.model_copy(update={"precision": "fp32"})})
    memory = training_memory(run, 0, 1, 3, False, Buckets(), on_gpu=False)
    assert memory.activations < most < memory.activations + memory.work


def test_offloaded_inputs_of_blocks_are_in_host_memory_but_for_two():
    def memory(**train):
        sections = {"model": {"name": "H/14", "pool": "gap"}, "train": {"activation_checkpointing": "all", **train}}
        return training_memory(Config.model_validate(sections), 0, 1, 8, False, Buckets(), on_gpu=True)

    entering = 8 * 256 * 1280 * 2
    here, there = memory(), memory(offload_activations=True)
    assert there.host - here.host == 32 * entering
    assert here.activations - there.activations == 30 * entering


@pytest.mark.parametrize("model", [{"pool": "gap"}, {"pool": "gap", "pos_embed": "relative"}], ids=str)
def test_activations_are_what_the_kernels_keep(model):
    if not dispatch.INTERPRETED:
        pytest.skip("does not apply: kernels need a GPU or Triton's interpreter")
    small = {"name": "Ti/16", "image_size": 80, "depth": 2, "width": 48, "heads": 3, "num_classes": 5}
    config = vit(**small, **model)
    built = build_vit(config, mean=(0.5,) * 3, std=(0.5,) * 3).bfloat16()
    images = torch.zeros(2, 80, 80, 3, dtype=torch.uint8)
    with dispatch.using("triton"), kept_by_autograd(built) as kept:
        loss = FusedCrossEntropy()(built.train()(images), torch.zeros(2, dtype=torch.int64))  # noqa: F841 - holds them
        measured = sum(storage.nbytes() for storage in kept.values()) / 2
    assert activation_bytes(config, "bf16", "fused") == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["R50x1", "R+Ti/16", "R26+Ti/32", "R50+Ti/16"])
def test_activations_of_convolutions_are_what_autograd_keeps(precision, name):
    """Plain PyTorch, on the CPU, as above; with the standardised weights, which are kept once."""
    model = {"name": name, "image_size": 96} | ({"depth": 2} if "+" in name else {})
    config = Config.model_validate({"model": model, "train": {"precision": precision}})
    built = build_for_training(config)
    built = built.bfloat16() if precision == "bf16" else built
    images = torch.zeros(3, 96, 96, 3, dtype=torch.uint8)
    with kept_by_autograd(built) as kept:
        loss = FusedCrossEntropy()(built.train()(images), torch.zeros(3, dtype=torch.int64))  # noqa: F841 - holds them
        measured = sum(storage.nbytes() for storage in kept.values())
    memory = training_memory(config, 0, 1, 3, False, Buckets(), on_gpu=False)
    assert memory.activations == pytest.approx(measured, rel=0.05)
    assert memory.work > 0


def test_a_resnet_that_is_frozen_keeps_little_and_gathers_a_block():
    def of_step(frozen):
        config = Config.model_validate({"model": {"name": "R50x1"}, "optimizer": {"frozen": frozen}})
        return training_memory(config, 0, 1, 8, False, Buckets(), on_gpu=False)

    assert of_step("backbone").activations < of_step("none").activations / 4
    largest = 1024 * 512 + 1024 * 2048 + 9 * 512**2 + 512 * 2048 + 2 * (1024 + 512 + 512)  # first of the last stage
    assert ParameterCounts.of(vit(name="R50x1")).block == largest


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("objective", "pool", "target"),
    [("mae", "gap", "mean"), ("mae", "cls", "mean"), *(("masked_patch", "cls", t) for t in ("mean", "grid", "pixels"))],
)
def test_activations_without_labels_are_what_autograd_keeps(precision, objective, pool, target):
    """Plain PyTorch, on the CPU, as above."""
    sections = {
        "model": {"name": "Ti/16", "image_size": 112, "depth": 3, "num_classes": 0, "pool": pool},
        "mae": {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 2},
        "masked_patch": {"target": target},
        "train": {"objective": objective, "precision": precision},
    }
    config = Config.model_validate(sections)
    built = build_for_training(config)
    built = built.bfloat16() if precision == "bf16" else built
    objective, labels = build_objective(config, torch.device("cpu")), torch.zeros(3, dtype=torch.int64)
    images = torch.randint(0, 256, (3, 112, 112, 3), dtype=torch.uint8)
    batch = Batch(images, labels, torch.ones(3), list("abc"), np.arange(3))
    with kept_by_autograd(built) as kept:
        losses = objective.losses(built.train(), batch)  # noqa: F841 - holds them
        measured = sum(storage.nbytes() for storage in kept.values()) / 3
    memory = training_memory(config, 0, 1, 1, False, Buckets(), on_gpu=False)
    assert memory.activations == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_views_that_are_told_apart_are_what_autograd_keeps(precision):
    """Plain PyTorch, on the CPU, as above. The teacher, here with the student's weights, leaves nothing."""
    sections = {
        "model": {"name": "Ti/16", "image_size": 112, "depth": 3, "num_classes": 0},
        "moco": {"hidden_width": 2048, "outputs": 64},
        "ema": {"decay": 0.9},
        "train": {"objective": "moco", "precision": precision, "global_batch_size": 3},
    }
    config = Config.model_validate(sections)
    built = build_for_training(config)
    built = built.bfloat16() if precision == "bf16" else built
    objective = build_objective(config, torch.device("cpu"))
    objective.learn_from(
        SimpleNamespace(applied=nullcontext, add_up=lambda values: values, gather=lambda rows: (rows, 0))
    )
    images = torch.randint(0, 256, (3, 2 * 3 * 112**2), dtype=torch.uint8)
    batch = Batch(images, torch.zeros(3, dtype=torch.int64), torch.ones(3), list("abc"), np.arange(3))
    with kept_by_autograd(built) as kept:
        losses = objective.losses(built.train(), batch)  # noqa: F841 - holds them
        measured = sum(storage.nbytes() for storage in kept.values()) / 3
    memory = training_memory(config, 0, 1, 1, False, Buckets(), on_gpu=False)
    assert memory.activations == pytest.approx(measured, rel=0.05)


def test_an_autoencoder_needs_less_memory_for_activations_than_its_encoder_alone():
    def memory(**sections):
        config = Config.model_validate({"model": {"name": "H/14", "pool": "gap", "num_classes": 0}} | sections)
        return training_memory(config, 0, 1, 64, False, Buckets(), on_gpu=True)

    masked, supervised = memory(train={"objective": "mae"}), memory()
    assert supervised.activations / 4 < masked.activations < supervised.activations / 2
    assert masked.weights - supervised.weights == pytest.approx(2 * 26.3e6, rel=0.01)  # bf16, the decoder's
    assert masked.work > supervised.work / 4  # a block of the decoder has all tokens


def test_plain_layers_on_a_gpu_keep_what_they_keep_on_a_cpu():
    assert block_implementation(vit(), "bf16", on_gpu=True) == "fused"
    assert block_implementation(vit(dropout=0.1), "bf16", on_gpu=True) == "composed"
    with dispatch.using("reference"):
        assert block_implementation(vit(), "bf16", on_gpu=True) == "reference"


@pytest.mark.parametrize(
    ("setting", "precision", "implementation"),
    [
        ("auto", "fp32", "composed"),  # products by cuBLAS, the normalisation by its kernel
        ("triton", "fp32", "fused"),
        ("attention=reference", "bf16", "composed"),
        ("layer_norm=reference", "bf16", "reference"),
    ],
)
def test_blocks_on_a_gpu_run_what_is_chosen_for_their_precision(setting, precision, implementation):
    with dispatch.using(setting):
        assert block_implementation(vit(), precision, on_gpu=True) == implementation


def test_activations_of_the_huge_model():
    """64 images of ViT-H/14 keep 15.9 GB: 31/32 of what kernels/README.md has of 32 blocks, and a third of the last."""
    config = Config.model_validate({"model": {"name": "H/14"}})
    memory = training_memory(config, 0, 1, 64, False, Buckets(), on_gpu=True)
    assert memory.activations == pytest.approx(15.9e9, rel=0.005)
    assert memory.total > memory.state + memory.activations


@pytest.mark.parametrize(("stage", "copies"), [(0, 0), (1, 0), (2, 2)])
def test_graphs_keep_their_memory_between_steps(stage, copies):
    """Activations, and the gradients that a replay writes, which stage 2 has copies of before it keeps its share."""

    def memory(batch: int = 128, **train):
        config = Config.model_validate({"model": {"name": "H/14"}, "train": {"global_batch_size": batch, **train}})
        return config, training_memory(config, stage, 2, 64, False, Buckets(), on_gpu=True)

    (config, plain), (_, graph), (_, unequal) = memory(), memory(cuda_graph=True), memory(127, cuda_graph=True)
    gradients = 2 * ParameterCounts.of_run(config).learning
    assert graph.captured == plain.activations + plain.work + gradients
    assert unequal.captured == 2 * graph.captured  # micro-batches of two sizes
    assert graph.total == plain.state + graph.captured + max(plain.update, copies * gradients // 2)
