"""Which optimizer a configuration gets, over which parameters, and what state it keeps."""

import math

import pytest
import torch

from fastvit_engine.config import Config, OptimizerConfig
from fastvit_engine.config.checks import check_config
from fastvit_engine.engine.optimizers.groups import APART, RATE_SCALE, parameter_groups
from fastvit_engine.engine.optimizers.kinds import KINDS, build_optimizer
from fastvit_engine.engine.optimizers.state import STATE_BYTES, is_hidden_matrix
from fastvit_engine.errors import UserError
from fastvit_engine.models import build_for_training, build_vit
from tests.fastvit_engine.engine.optimizers.flat import Rank, use_threads
from tests.fastvit_engine.ranks import on_ranks


def config(**sections):
    return Config.model_validate({"model": {"name": "Ti/4", "image_size": 8, "depth": 1}, **sections})


def model(**changes):
    section = config().model.model_copy(update=changes)
    return build_vit(section, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_every_kind_of_the_configuration_can_be_built():
    kinds = OptimizerConfig.model_fields["kind"].annotation.__args__
    assert set(kinds) == set(KINDS) == set(STATE_BYTES)
    for kind in kinds:
        built = build_optimizer(model(), config(optimizer={"kind": kind}), on_gpu=False)
        assert isinstance(built, torch.optim.Optimizer)


def test_adamw_gets_its_settings():
    section = {"learning_rate": 3e-4, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.3}
    built = build_optimizer(model(), config(optimizer=section), on_gpu=False)
    assert isinstance(built, torch.optim.AdamW)
    assert [group["weight_decay"] for group in built.param_groups] == [0.3, 0.0]
    for group in built.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-7)


def test_sgd_gets_its_settings():
    section = {"kind": "sgd", "learning_rate": 3e-2, "momentum": 0.8, "weight_decay": 0.3, "betas": (0.1, 0.2)}
    built = build_optimizer(model(), config(optimizer=section), on_gpu=False)
    assert isinstance(built, torch.optim.SGD)
    assert [group["weight_decay"] for group in built.param_groups] == [0.3, 0.0]
    for group in built.param_groups:
        assert (group["lr"], group["momentum"], group["nesterov"], group["dampening"]) == (3e-2, 0.8, False, 0)


@pytest.mark.parametrize(("depth", "decay"), [(1, 0.5), (3, 0.75), (3, 1.0)])
@pytest.mark.parametrize(
    "changes", [{}, {"head": "mlp", "layer_scale": 1e-4}, {"pool": "gap"}, {"pool": "map", "registers": 2}]
)
def test_layer_decay_lowers_the_rate_layer_by_layer(depth, decay, changes):
    built = model(depth=depth, **changes)
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    groups = parameter_groups(built, OptimizerConfig(weight_decay=0.3, layer_decay=decay))
    found = {names[id(p)]: (group[RATE_SCALE], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    for name, (scale, weight_decay) in found.items():
        if name in ("cls_token", "reg_token", "pos_embed") or name.startswith("patch_embed."):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = depth + 1
        assert scale == pytest.approx(decay ** (depth + 1 - layer)), name
        assert weight_decay == (0.3 if name.endswith(".weight") and "norm" not in name else 0), name
    assert all(group["params"] for group in groups)


@pytest.mark.parametrize("pool", ["cls", "map"])
def test_what_is_frozen_is_in_no_group(pool):
    built = model(head="mlp", dropout=0.5, drop_path=0.5, pool=pool)
    built.train()
    built.freeze_backbone()
    groups = parameter_groups(built, OptimizerConfig(layer_decay=0.75))
    assert {id(p) for group in groups for p in group["params"]} == {id(built.head.weight), id(built.head.bias)}
    assert {group[RATE_SCALE] for group in groups} == {1.0}


def test_hidden_matrices_are_those_of_the_blocks_of_encoder_and_decoder():
    sections = {"train": {"objective": "mae"}, "mae": {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}}
    built = build_for_training(config(**sections))
    groups = parameter_groups(built, OptimizerConfig(layer_decay=0.5), is_hidden_matrix)
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    found = {names[id(p)] for group in groups for p in group["params"] if group[APART]}
    matrices = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = ("blocks.0", "decoder.blocks.0", "decoder.blocks.1")
    assert found == {f"{block}.{matrix}.weight" for block in blocks for matrix in matrices}
    decoder = {group[RATE_SCALE] for group in groups for p in group["params"] if "decoder." in names[id(p)]}
    assert decoder == {1.0}  # it comes after the last layer


def test_weight_decay_reaches_the_matrices_only():
    built = model(head="mlp", layer_scale=1e-4)
    decayed, spared = parameter_groups(built, OptimizerConfig(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "pre_logits.fc.weight",
        "head.weight",
    }
    assert decayed["weight_decay"] == 0.3
    assert spared["weight_decay"] == 0
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert all(isinstance(p, torch.nn.Parameter) for p in spared["params"])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_classifier_may_be_decayed_by_itself(kind):
    built = model(head="mlp")
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    section = {"kind": kind, "weight_decay": 0.3, "head_weight_decay": 3.0, "layer_decay": 0.5}
    optimizer = build_optimizer(built, config(optimizer=section), on_gpu=False)
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, decay in decays.items() if decay == 3.0} == {"head.weight"}
    assert decays["pre_logits.fc.weight"] == decays["blocks.0.mlp.fc1.weight"] == 0.3
    assert decays["head.bias"] == 0.0 and len(decays) == len(names)


def test_a_decay_of_the_classifier_makes_no_group_without_need():
    alike = (OptimizerConfig(weight_decay=0.3, head_weight_decay=given) for given in (None, 0.3))
    assert [len(parameter_groups(model(), settings)) for settings in alike] == [2, 2]
    assert len(parameter_groups(model(), OptimizerConfig(weight_decay=0.3, head_weight_decay=0.0))) == 3


def test_lion_muon_lamb_and_adafactor_have_defaults_of_their_own():
    def chosen(**section):
        section = config(optimizer=section).optimizer
        return section.betas, section.eps, section.momentum

    assert chosen() == ((0.9, 0.999), 1e-8, 0.9)
    assert chosen(kind="lion")[0] == (0.9, 0.99)
    assert chosen(kind="muon") == ((0.9, 0.999), 1e-8, 0.95)
    assert chosen(kind="lamb")[1] == 1e-6
    assert chosen(kind="adafactor")[1] == 1e-30
    assert chosen(kind="lion", betas=(0.8, 0.7))[0] == (0.8, 0.7)


@pytest.mark.parametrize(
    ("kind", "share"), [("adamw", 8), ("sgd", 4), ("lion", 4), ("muon", (4, 6)), ("lamb", 8), ("adafactor", (2, 4))]
)
def test_the_bytes_of_state_are_those_that_it_has(kind, share, monkeypatch):
    use_threads(monkeypatch)
    settings = config(optimizer={"kind": kind}).optimizer

    def run(world):
        rank = Rank(world, model(width=64, mlp_dim=256, heads=2, num_classes=10), settings, sharded=False)
        rank.step(0)
        tensors = [t for state in rank.optimizer.state.values() for t in state.values() if t is not None and t.ndim]
        tensors += [t for of_kind in getattr(rank.optimizer, "statistics", {}).values() for t in of_kind.values()]
        return sum(t.nbytes for t in tensors), {name: tuple(tensor.shape) for name, tensor in rank.whole.items()}

    ((measured, shapes),) = on_ranks(1, run)
    assert measured == sum(STATE_BYTES[kind](settings, name, shape) for name, shape in shapes.items())
    low, high = share if isinstance(share, tuple) else (share, share)
    assert low <= measured / sum(math.prod(shape) for shape in shapes.values()) <= high


def test_muon_without_a_matrix_to_update_is_refused():
    with pytest.raises(UserError, match="set optimizer.kind=adamw"):
        check_config(config(optimizer={"kind": "muon", "frozen": "backbone"}))
