"""What an engine's optimizer does to the weights: each kind, rates that differ by layer, and what is frozen."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from fastvit_engine.config import Config
from fastvit_engine.data.stream.batch_split import BatchSplit
from fastvit_engine.engine import build as build_module
from fastvit_engine.engine import deepspeed as module
from fastvit_engine.engine.build import build_engine
from fastvit_engine.engine.optimizers import muon
from fastvit_engine.engine.optimizers.kinds import build_optimizer
from fastvit_engine.engine.optimizers.partition import Partition, PartitionedOptimizer, Span
from fastvit_engine.models import build_vit
from fastvit_kernels import FusedBlock
from tests.in_full import in_full

MODEL = {"name": "Ti/4", "image_size": 8, "width": 24, "depth": 2, "heads": 2, "mlp_dim": 40, "num_classes": 5}
IMAGES = torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
STEPS = 5
SGD = {"kind": "sgd", "momentum": 0.9, "weight_decay": 0.1}
EVERY_STAGE = [0, 1, 2, 3]


def build_model(config):
    torch.manual_seed(0)
    model = build_vit(config.model, mean=(0.5,) * 3, std=(0.5,) * 3)
    torch.nn.init.normal_(model.head.weight, std=0.2)
    if config.optimizer.frozen == "backbone":
        model.freeze_backbone()
    return model


@pytest.fixture
def build(lone_world, monkeypatch):
    """build(stage, precision, **optimizer) -> (engine, model before DeepSpeed had it)"""
    accelerator = module.import_deepspeed().accelerator.get_accelerator()
    monkeypatch.setattr(type(accelerator), "is_fp16_supported", lambda self: True)
    engines = []

    def make(stage, precision="fp32", offload="none", dropout=0.0, model=None, **optimizer):
        zero = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 500} if stage == 3 else {}
        config = Config.model_validate(
            {
                "model": {**MODEL, "dropout": dropout, "drop_path": dropout, **(model or {})},
                "optimizer": optimizer,
                "train": {"global_batch_size": len(LABELS), "precision": precision},
                "zero": {"stage": stage, "offload": offload},
                "deepspeed": {"zero_optimization": zero} if zero else {},
            }
        )
        if precision == "fp16":  # which a CPU is slow in, no more
            with_gpu = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))
            monkeypatch.setattr(build_module, "torch", with_gpu)
        before = build_model(config)
        engines.append(build_engine(build_model(config), config, BatchSplit(len(LABELS), 1, 1), lone_world))
        engines[-1].model.train()
        return engines[-1], before

    yield make
    for engine in engines:
        engine.close()


def rate(step):
    return 0.05 / (1 + step)


def train(engine, steps=STEPS):
    for step in range(steps):
        engine.set_learning_rate(rate(step))
        engine.backward(functional.cross_entropy(engine.model(IMAGES).float(), LABELS))
        engine.step()


def masters(engine):
    """The fp32 weights whole, by name; one process holds all of them."""
    pieces = {}
    for part in sorted(engine.master_weights(), key=lambda part: part.start):
        pieces.setdefault(part.name, []).append(part.values.detach().clone())
    return {name: torch.cat(values) for name, values in pieces.items()}


def trained_by(optimizer, model, scales=None):
    """The weights after STEPS of a PyTorch optimizer without any engine; scales: of the groups' learning rates."""
    for step in range(STEPS):
        for group, scale in zip(optimizer.param_groups, scales or [1.0] * 99, strict=False):
            group["lr"] = rate(step) * scale
        optimizer.zero_grad()
        functional.cross_entropy(model(IMAGES).float(), LABELS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: parameter.detach().flatten() for name, parameter in model.named_parameters()}


def assert_near(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (found[name] - values).abs().max() < tolerance, name


def by_decay(model):
    matrices = [p for name, p in model.named_parameters() if name.endswith(".weight") and p.ndim >= 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return matrices, rest


# ---- position embeddings


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(
    "positions",
    [
        {"pos_embed": "relative"},
        {"pos_embed": "learned", "pos_embed_at": "every_layer"},
        {"pos_embed": "learned_2d", "pos_embed_at": "shared"},
        in_full({"pos_embed": "learned_2d"}),
        in_full({"pos_embed": "none"}),
    ],
    ids=str,
)
def test_position_tables_learn_as_without_an_engine(build, stage, positions):
    engine, model = build(stage, model=positions, kind="sgd", momentum=0.0, weight_decay=0.0)
    start = {name: parameter.detach().flatten().clone() for name, parameter in model.named_parameters()}
    train(engine)
    expected = trained_by(torch.optim.SGD(model.parameters()), model)
    found = masters(engine)
    assert_near(found, expected)
    tables = [name for name in start if "pos_embed" in name]
    assert len(tables) == {"relative": 2, "learned": 1, "learned_2d": 2, "none": 0}[positions["pos_embed"]]
    for name in tables:
        assert (found[name] - start[name]).abs().max() > 1e-5, name


# ---- SGD


@pytest.mark.parametrize(
    ("stage", "momentum"), [(0, 0.9), (1, 0.9), (2, 0.9), (3, 0.9), in_full(0, 0.0), (1, 0.0), in_full(3, 0.0)]
)
def test_sgd_is_that_of_pytorch_at_every_stage(build, stage, momentum):
    engine, model = build(stage, **SGD | {"momentum": momentum})
    train(engine)
    matrices, rest = by_decay(model)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    expected = trained_by(torch.optim.SGD(groups, lr=1, momentum=momentum), model.train())
    assert_near(masters(engine), expected)
    assert engine.optimizer_state().keys() == ({"momentum_buffer"} if momentum else set())
    assert engine.scalars() == {}


@pytest.mark.parametrize(
    ("precision", "stage"),
    [("bf16", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3), ("fp16", 0), in_full("fp16", 1), ("fp16", 2), ("fp16", 3)],
)
def test_sgd_updates_fp32_masters_of_16_bit_weights(build, stage, precision):
    engine, model = build(stage, precision, **SGD)
    if precision == "fp16":  # as if the loss scale had been lowered until it fits
        engine.prepare_optimizer({}, {"loss_scaler.cur_scale": 8.0})
    train(engine)
    matrices, rest = by_decay(model)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    expected = trained_by(torch.optim.SGD(groups, lr=1, momentum=0.9), model.train())
    assert_near(masters(engine), expected, 0.01)
    assert all(part.values.dtype == torch.float32 for part in engine.master_weights())
    computed = dict(engine.held_parameters())
    for name, values in masters(engine).items():
        assert torch.equal(computed[name].flatten(), values.to(computed[name].dtype)), name


@pytest.mark.parametrize(
    ("stage", "kind"), [(0, "adamw"), (0, "sgd"), (1, "adamw"), in_full(2, "sgd"), in_full(3, "sgd")]
)
def test_the_first_update_is_the_first(build, stage, kind):
    """DeepSpeed's optimizer for 16 bits without ZeRO makes one when it is built, which decays the weights."""
    engine, model = build(stage, "bf16", kind=kind, weight_decay=1.0, learning_rate=0.5)
    assert engine.optimizer_state() == {}
    for name, values in masters(engine).items():
        assert torch.equal(values, dict(model.named_parameters())[name].detach().flatten().bfloat16().float()), name
    train(engine, 2)
    assert engine.scalars() == ({"optimizer.step": 2.0} if kind == "adamw" else {})


# ---- Lion, Muon, LAMB, Adafactor

OWN = ("lion", "muon", "lamb", "adafactor")


def whole(model, kind):
    """The engine's optimizer of a kind, over whole parameters."""
    config = Config.model_validate({"optimizer": {"kind": kind, "eps": 1e-3, "weight_decay": 0.1}})
    optimizer = build_optimizer(model, config, on_gpu=False)
    if isinstance(optimizer, PartitionedOptimizer):
        parameters = dict(model.named_parameters())
        partitions = [Partition(p, [Span(name, 0, 0, p.numel())], [name]) for name, p in parameters.items()]
        shapes = {name: list(p.shape) for name, p in parameters.items()}
        optimizer.attach(partitions, shapes, replicated=True, device=torch.device("cpu"))
    return optimizer


@pytest.mark.parametrize(
    ("kind", "stage", "offload"),
    [
        *(("lion", 1, "none"), ("muon", 1, "none"), ("muon", 3, "none"), ("lamb", 2, "none"), ("adafactor", 3, "none")),
        *(in_full(kind, stage, "none") for kind, stage in product(OWN, EVERY_STAGE)),
        *(in_full(kind, *how) for kind, how in product(OWN, ((1, "optimizer"), (2, "optimizer"), (3, "all")))),
    ],
)
def test_others_do_on_what_zero_gives_them_what_they_do_on_whole_parameters(build, kind, stage, offload, monkeypatch):
    monkeypatch.setattr(muon, "DTYPE", torch.float32)  # bf16's noise grows in the directions that no image has
    engine, model = build(stage, offload=offload, kind=kind, eps=1e-3, weight_decay=0.1)
    train(engine)
    found, expected = masters(engine), trained_by(whole(model, kind), model.train())
    for name in expected if kind == "lion" else ():
        if name.endswith("qkv.bias"):  # the keys' gradient is zero but for rounding, which has a sign, too
            found[name].chunk(3)[1].zero_()
            expected[name].chunk(3)[1].zero_()
    assert_near(found, expected, {"muon": 2e-4, "adafactor": 2e-4}.get(kind, 1e-5))  # bf16 momentum


@pytest.mark.parametrize(("kind", "stage"), [("muon", 0), ("adafactor", 2), in_full("lamb", 3), in_full("muon", 2)])
def test_an_update_that_is_not_approved_changes_neither_weights_nor_state(build, kind, stage):
    engine, _ = build(stage, kind=kind)
    train(engine, 2)

    def everything():
        state = [*engine.optimizer_state().values(), *engine.optimizer_statistics().values()]
        return [part.values.clone() for slices in [engine.master_weights(), *state] for part in slices]

    before, scalars = everything(), engine.scalars()
    norms = []
    engine.approve_updates(lambda norm: norms.append(float(norm)))
    train(engine, 1)
    assert norms and all(norm > 0 for norm in norms)
    assert engine.scalars() == scalars
    assert all(torch.equal(one, other) for one, other in zip(before, everything(), strict=True))


@pytest.mark.parametrize(
    ("kind", "stage"), [("muon", 0), in_full("lamb", 0), in_full("adafactor", 2), in_full("muon", 3)]
)
def test_the_first_update_in_16_bits_is_the_first(build, kind, stage):
    engine, model = build(stage, "bf16", kind=kind)
    assert engine.optimizer_state() == {} and engine.optimizer_statistics() == {}
    for name, values in masters(engine).items():
        assert torch.equal(values, dict(model.named_parameters())[name].detach().flatten().bfloat16().float()), name
    train(engine, 2)
    assert engine.scalars() == {"optimizer.step": 2.0}
    assert all(values.isfinite().all() for values in masters(engine).values())


# ---- layers


@pytest.mark.parametrize(
    ("stage", "kind"), [(0, "adamw"), (1, "sgd"), (2, "adamw"), (3, "sgd"), in_full(3, "adamw"), in_full(0, "sgd")]
)
def test_each_layer_learns_at_its_own_rate(build, stage, kind):
    engine, model = build(stage, kind=kind, weight_decay=0.0, layer_decay=0.5, eps=1e-3)
    train(engine)
    layers = [[], [], [], []]
    for name, parameter in model.named_parameters():
        embeds = name.split(".")[0] in ("cls_token", "pos_embed", "patch_embed")
        layers[0 if embeds else int(name.split(".")[1]) + 1 if name.startswith("blocks") else 3].append(parameter)
    made = {"adamw": lambda p: torch.optim.AdamW(p, eps=1e-3, weight_decay=0.0)}
    made["sgd"] = lambda p: torch.optim.SGD(p, momentum=0.9)
    optimizer = made[kind]([{"params": layer} for layer in layers])
    assert_near(masters(engine), trained_by(optimizer, model.train(), [0.125, 0.25, 0.5, 1.0]))


# ---- a frozen backbone


@pytest.mark.parametrize(
    ("stage", "precision", "offload", "kind"),
    [
        (0, "fp32", "none", "adamw"),
        (0, "bf16", "none", "sgd"),
        (1, "bf16", "none", "adamw"),
        (2, "fp32", "none", "sgd"),
        (2, "bf16", "optimizer", "adamw"),
        (3, "bf16", "none", "adamw"),
        (3, "fp32", "optimizer", "sgd"),
        *(in_full(s, p, "none", k) for s, p, k in product(EVERY_STAGE, ("fp32", "bf16", "fp16"), ("adamw", "sgd"))),
    ],
)
def test_not_a_bit_of_a_frozen_backbone_changes(build, stage, precision, offload, kind):
    engine, model = build(
        stage, precision, offload, dropout=0.3, kind=kind, frozen="backbone", learning_rate=0.3, weight_decay=0.5
    )
    backbone = {name for name, _ in model.named_parameters()} - {"head.weight", "head.bias"}
    assert engine.frozen == backbone
    assert {name for name, _ in engine.named_parameters()} == {"head.weight", "head.bias"}
    exact = {name: parameter.detach().flatten() for name, parameter in model.named_parameters()}
    for part in engine.master_weights():  # as reading weights does it: in fp32, whatever the model computes in
        part.values.copy_(exact[part.name][part.start : part.stop])
    engine.publish()
    computed = {name: values.detach().clone() for name, values in engine.held_parameters()}
    if precision == "fp16":
        engine.prepare_optimizer({}, {"loss_scaler.cur_scale": 8.0})
    train(engine)
    after = masters(engine)
    assert after.keys() == exact.keys()
    for name in backbone:
        assert torch.equal(after[name], exact[name]), name
        assert torch.equal(dict(engine.held_parameters())[name], computed[name]), name
    assert not torch.equal(after["head.weight"], exact["head.weight"])
    for slices in engine.optimizer_state().values():
        assert {part.name for part in slices} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("stage", [0, 3])
def test_a_frozen_backbone_computes_as_in_evaluation_and_has_no_backward_pass(build, stage):
    engine, model = build(stage, dropout=0.5, frozen="backbone")
    first, again = engine.model(IMAGES), engine.model(IMAGES)
    assert torch.equal(first, again)
    assert torch.allclose(first, model.eval()(IMAGES), atol=1e-6)
    nodes, found = [first.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes += [inner for inner, _ in node.next_functions]
    assert len(found) < 12  # of the last linear layer, and of what ZeRO-3 puts around it


@pytest.mark.parametrize("stage", [0, 2, in_full(1), 3])
def test_the_norm_of_a_linear_probe_is_that_of_its_head(build, stage):
    engine, model = build(stage, frozen="backbone")
    norms = []
    engine.approve_updates(lambda norm: norms.append(float(norm)) or True)
    train(engine, 1)
    functional.cross_entropy(model.train()(IMAGES), LABELS).backward()
    expected = torch.cat([p.grad.flatten() for p in model.head.parameters()]).norm().item()
    assert norms[0] == pytest.approx(expected, rel=1e-4)


def test_hooks_of_deepspeed_leave_the_last_block_to_the_class_token(build, monkeypatch):
    seen, forward = [], FusedBlock.forward

    def watch(block, x, outputs=None):
        seen.append(outputs)
        return forward(block, x, outputs)

    monkeypatch.setattr(FusedBlock, "forward", watch)
    monkeypatch.setattr(module, "shorten_zero_3", lambda optimizer: None)  # which takes the hooks away on one process
    engine, _ = build(3)
    train(engine, steps=1)
    assert engine.model.module.blocks[-1]._forward_hooks and seen == [None, 1]
