"""Which optimizer a configuration gets, over which parameters, and at which ZeRO stages."""

import dataclasses

import pytest
import torch

from fastvit_engine.config import Config, OptimizerConfig
from fastvit_engine.data.stream.batch_split import BatchSplit
from fastvit_engine.engine import optimizers
from fastvit_engine.engine.build import deepspeed_config
from fastvit_engine.engine.optimizers import KINDS, RATE_SCALE, build_optimizer, parameter_groups, possible_stages
from fastvit_engine.errors import UserError
from fastvit_engine.models import build_vit
from fastvit_engine.sizing.defaults import Machine, choose

MACHINE = Machine(processes=2, processes_per_node=2, memory=2**34, on_gpu=False)


def config(**sections):
    return Config.model_validate({"model": {"name": "Ti/4", "image_size": 8, "depth": 1}, **sections})


def model(**changes):
    section = config().model.model_copy(update=changes)
    return build_vit(section, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_every_kind_of_the_configuration_can_be_built():
    kinds = OptimizerConfig.model_fields["kind"].annotation.__args__
    assert set(kinds) == set(KINDS)
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


@pytest.fixture
def picky(monkeypatch):
    """AdamW, as if it worked at ZeRO-1 and 2 only."""
    kind = dataclasses.replace(KINDS["adamw"], stages=frozenset({1, 2}))
    monkeypatch.setitem(optimizers.KINDS, "adamw", kind)


def test_a_stage_that_the_kind_cannot_do_is_refused(picky):
    message = r"optimizer.kind = adamw does not work at zero.stage = 3, only at 1, 2: change one of the two"
    wrong = config(zero={"stage": 3})
    for refuse in (lambda: deepspeed_config(wrong, BatchSplit(1, 1, 1)), lambda: choose(wrong, MACHINE)):
        with pytest.raises(UserError, match=message):
            refuse()
    with pytest.raises(UserError, match=r"adamw does not work with zero.offload = all"):
        choose(config(zero={"offload": "all"}), MACHINE)


def test_the_stage_that_is_chosen_is_one_that_the_kind_can_do(picky):
    assert choose(config(), MACHINE).config.zero.stage == 1
    assert possible_stages(config()) == {1, 2}
    assert possible_stages(config(zero={"offload": "all"})) == set()


@pytest.mark.parametrize(("offload", "stages"), [("none", {0, 1, 2, 3}), ("optimizer", {1, 2, 3}), ("all", {3})])
def test_offloading_limits_the_stages(offload, stages):
    assert possible_stages(config(zero={"offload": offload})) == stages
