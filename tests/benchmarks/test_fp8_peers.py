"""Layers in FP8 by other libraries: how they are asked for, and what is said of a version that cannot."""

from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import fp8_peers
from benchmarks.kernels import Effort, Selection, measure_case, select
from benchmarks.machine import measure_ceilings
from benchmarks.registry import Unusable
from benchmarks.timing import Clock
from benchmarks.train_variants import exchange_linear_layers

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Recipe:
    """As torchao's Float8LinearConfig."""

    name: str
    pad_inner_dim: bool = False
    emulate: bool = False

    @classmethod
    def from_recipe_name(cls, name: str) -> "Recipe":
        return cls(name)


@pytest.fixture
def installed(monkeypatch):
    """Modules by name, in place of those that are installed."""
    modules: dict[str, object] = {}
    monkeypatch.setattr(fp8_peers, "need", modules.__getitem__)
    monkeypatch.setattr(fp8_peers, "version", lambda package: "0.1")
    return modules


def test_torchao_is_told_to_pad_what_its_products_do_not_take(installed):
    asked = {}

    def convert(module, *, module_filter_fn, config):
        names = [name for name, layer in module.named_modules() if module_filter_fn(layer, name)]
        asked[config] = names
        return module

    installed["torchao.float8"] = SimpleNamespace(Float8LinearConfig=Recipe, convert_to_float8_training=convert)
    model = nn.ModuleDict({"blocks": nn.Linear(16, 16), "head": nn.Linear(16, 16)})
    fp8_peers.torchao_layers(model, "rowwise", rows=64 * 257, wanted=lambda name: name == "blocks")
    fp8_peers.torchao_layers(model.to("meta"), "tensorwise", rows=4 * 257, wanted=lambda name: name == "head")
    assert asked == {Recipe("rowwise", emulate=True): ["blocks"], Recipe("tensorwise", pad_inner_dim=True): ["head"]}


@pytest.mark.parametrize("since_2_9", [False, True])
def test_transformer_engine_is_asked_for_current_scaling_by_the_name_it_has(installed, since_2_9):
    entered = []

    @contextmanager
    def autocast(**options):
        entered.append(options)
        yield

    recipes = SimpleNamespace(Float8CurrentScaling=lambda: "current")
    engine = SimpleNamespace(**{"autocast" if since_2_9 else "fp8_autocast": autocast})
    installed |= {"transformer_engine.pytorch": engine, "transformer_engine.common.recipe": recipes}
    found, in_fp8 = fp8_peers.transformer_engine(64 * 257)
    for _ in range(2):
        with in_fp8():
            pass
    assert found is engine
    assert entered == [{"enabled": True, "recipe" if since_2_9 else "fp8_recipe": "current"}] * 2


def test_a_version_that_cannot_is_named(installed):
    installed["torchao.float8"] = SimpleNamespace(Float8LinearConfig=object)
    with pytest.raises(Unusable, match=r"torchao 0\.1 has no recipes by name"):
        fp8_peers.torchao_layers(nn.Linear(16, 16), "rowwise", rows=16)
    installed |= {"transformer_engine.pytorch": SimpleNamespace(), "transformer_engine.common.recipe": object()}
    with pytest.raises(Unusable, match=r"TransformerEngine 0\.1 has no current scaling"):
        fp8_peers.transformer_engine(64)
    with pytest.raises(Unusable, match="takes rows in multiples of 8, and there are 1,028"):
        fp8_peers.transformer_engine(4 * 257)


def test_exchanged_layers_have_the_weights_of_those_before():
    class Own(nn.Linear):
        def __init__(self, inputs, outputs, params_dtype):
            super().__init__(inputs, outputs, dtype=params_dtype)
            self.register_buffer("of_its_own", torch.ones(1))

    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 2)))
    x = torch.randn(3, 4)
    before = model(x)
    exchange_linear_layers(model, Own)
    assert [type(layer) for layer in model.modules() if isinstance(layer, nn.Linear)] == [Own, Own]
    assert torch.equal(model(x), before)


def test_torchao_as_it_is_computes_a_linear_layer():
    """Emulated, and judged as on a GPU: its recipes, padding, gradients of input, weight and bias."""
    pytest.importorskip("torchao", reason="torchao is not installed", exc_type=ImportError)
    (case,) = select(Selection(ops=("fp8_linear",), models=("tiny/14@56",), quick=True), CPU)
    assert case.rows % 16
    clock = Clock(CPU)
    ceilings = measure_ceilings(clock, [torch.float32], quick=True)
    skip = lambda provider: None if provider.name.startswith("torchao") else "another"  # noqa: E731
    row = measure_case(case, clock, ceilings, effort=Effort(rounds=2, seconds=1), skip=skip)
    of = {provider["provider"]: provider for provider in row["providers"]}
    for name in ("torchao tensorwise", "torchao rowwise"):
        assert of[name]["status"] == "ok", of[name]
