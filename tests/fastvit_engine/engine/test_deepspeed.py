"""What DeepSpeed's insides must look like, and that only one module knows.

A DeepSpeed release that moves one of them fails here with the sentence that a run would be refused with.
"""

import ast
import importlib
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastvit_engine
from fastvit_engine.config.deepspeed_section import KEYS
from fastvit_engine.distributed.environment import VERBOSE
from fastvit_engine.engine import deepspeed as module
from fastvit_engine.engine import deepspeed_gradients as gradients_module
from fastvit_engine.engine.deepspeed import (
    ENGINE_INTERNALS,
    PARAMETER_INTERNALS,
    SCALER_INTERNALS,
    DeepSpeedEngine,
    Layout,
    Plain,
    Unpartitioned16Bit,
    Zero1And2,
    Zero1Bf16,
    Zero3,
    import_deepspeed,
    initialize,
    missing_internals,
)
from fastvit_engine.errors import UserError

LAYOUTS = (Plain, Unpartitioned16Bit, Zero1And2, Zero1Bf16, Zero3)
SOURCE = Path(module.__file__)
SOURCES = (SOURCE, Path(gradients_module.__file__))
# Names that PyTorch's optimizers and modules have, too.
COMMON = {"backward", "device", "dtype", "flatten", "module", "optimizer", "param_groups", "state", "step", "zero_grad"}
COMMON |= {"partition_size", *KEYS, *KEYS["zero_optimization"]}  # the keys of its configuration are no insides


@pytest.fixture
def build(lone_world, monkeypatch):
    """build(stage, precision, offload) -> a DeepSpeedEngine of a tiny model."""
    accelerator = module.import_deepspeed().accelerator.get_accelerator()
    monkeypatch.setattr(type(accelerator), "is_fp16_supported", lambda self: True)  # a CPU is slow in it, no more
    engines = []

    def make(stage, precision, offload="none"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 3))
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100}
        if offload != "none":
            zero["offload_optimizer"] = {"device": "cpu"}
        settings = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 1.0,
            "zero_optimization": zero,
            "bf16": {"enabled": precision == "bf16"},
            "fp16": {"enabled": precision == "fp16"},
            "zero_force_ds_cpu_optimizer": False,
        }
        if precision != "fp32" and stage > 0:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        groups = [{"params": [layer.weight for layer in model]}, {"params": [layer.bias for layer in model]}]
        engines.append(initialize(model, torch.optim.AdamW(groups), settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


CASES = [
    (0, "fp32", "none", Plain),
    (0, "bf16", "none", Unpartitioned16Bit),
    (0, "fp16", "none", Unpartitioned16Bit),
    (1, "fp32", "none", Zero1And2),
    (1, "bf16", "none", Zero1Bf16),
    (1, "fp16", "none", Zero1And2),
    (2, "fp32", "none", Zero1And2),
    (2, "bf16", "optimizer", Zero1And2),
    (2, "fp16", "none", Zero1And2),
    (3, "fp32", "none", Zero3),
    (3, "bf16", "none", Zero3),
    (3, "fp16", "optimizer", Zero3),
]


@pytest.mark.parametrize(("stage", "precision", "offload", "layout"), CASES)
def test_everything_used_is_there(build, stage, precision, offload, layout):
    engine = build(stage, precision, offload)
    assert type(engine._layout) is layout
    assert missing_internals(engine._engine, engine._layout) == []
    norms = []
    engine.approve_updates(lambda norm: norms.append(float(norm)) or True)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    before = {part.name: part.values.clone() for part in engine.master_weights()}
    for _ in range(3):  # fp16: until the loss scale is low enough
        engine.backward(engine.model(torch.ones(4, 12, dtype=dtype)).float().square().mean())
        engine.step()
        engine.publish()
    assert engine.shapes == {"0.weight": [20, 12], "0.bias": [20], "1.weight": [3, 20], "1.bias": [3]}
    assert before.keys() == engine.shapes.keys()
    if norms:
        assert all(norm > 0 for norm in norms)
        assert any(not torch.equal(part.values, before[part.name]) for part in engine.master_weights())
        assert engine.optimizer_state().keys() == {"exp_avg", "exp_avg_sq"}
        assert engine.scalars()["optimizer.step"] >= 1
    assert norms or precision == "fp16"
    scaled = {name for name in engine.scalars() if name.startswith("loss_scaler.")}
    assert bool(scaled) == (precision == "fp16")
    engine.reset_progress(7)
    assert (engine._engine.global_steps, engine._engine.micro_steps) == (7, 7)


def take_step(engine, precision, inputs):
    """One step with gradients that are far above the clipping limit of 1."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    engine.backward(engine.model(inputs.to(dtype)).float().square().mean() * 50)
    engine.step()


def everything(engine):
    slices = {"weight": engine.master_weights(), **engine.optimizer_state()}
    return {(kind, part.name): part.values.clone() for kind, of_kind in slices.items() for part in of_kind}


def weights(engine):
    return {part.name: part.values.clone() for part in engine.master_weights()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [key for key, values in one.items() if not torch.equal(values, other[key])] == []


STEPPING = [
    (0, "fp32", Plain),
    (0, "bf16", Unpartitioned16Bit),
    (2, "fp32", Zero1And2),
    (2, "fp16", Zero1And2),
    (1, "bf16", Zero1Bf16),
    (3, "fp32", Zero3),
]


@pytest.mark.parametrize(("stage", "precision", "layout"), STEPPING)
def test_a_step_clips_learns_at_the_rate_of_all_groups_and_changes_nothing_unless_approved(
    build, stage, precision, layout
):
    engine, inputs = build(stage, precision), torch.ones(4, 12)
    approved, norms = [True], []

    def approve(norm):
        norms.append(float(norm))
        return approved[0]

    engine.approve_updates(approve)
    engine.set_learning_rate(0.0)
    first = weights(engine)
    while not norms:  # fp16: until the loss scale is low enough
        take_step(engine, precision, inputs)
    after = everything(engine)
    assert norms[0] > 2  # before clipping
    moments = torch.cat([values for (kind, _), values in after.items() if kind == "exp_avg"])
    assert moments.norm().item() / 0.1 == pytest.approx(1.0, rel=0.02)  # 1 - beta of a gradient of norm 1
    assert_equal(first, weights(engine))

    approved[0], asked = False, len(norms)
    engine.set_learning_rate(0.01)
    take_step(engine, precision, inputs)
    assert len(norms) > asked
    assert_equal(after, everything(engine))

    approved[0] = True
    take_step(engine, precision, inputs)
    assert [name for name, values in weights(engine).items() if torch.equal(values, first[name])] == []


@pytest.mark.parametrize(("stage", "precision", "layout"), STEPPING)
def test_an_engine_with_the_state_of_another_goes_on_as_that_one(build, stage, precision, layout):
    inputs = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    one, other = build(stage, precision), build(stage, precision)
    while one.scalars().get("optimizer.step", 0) < 3:
        take_step(one, precision, inputs)
    take_step(other, precision, 2 * inputs)  # another past
    other.backward(other.model(next(iter(other.model.parameters())).new_ones(4, 12)).float().mean())  # half a step
    saved, scalars = everything(one), one.scalars()
    other.prepare_optimizer(dict.fromkeys(("exp_avg", "exp_avg_sq"), other.shapes), scalars)
    for kind, slices in {"weight": other.master_weights(), **other.optimizer_state()}.items():
        for part in slices:
            part.values.copy_(saved[kind, part.name])
    other.publish()
    other.reset_progress(3)
    assert other.scalars() == scalars
    for engine in (one, other):
        take_step(engine, precision, inputs)
    assert_equal(everything(one), everything(other))
    assert one.scalars() == other.scalars()


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16")])
def test_one_process_reduces_nothing_and_trains_the_same(build, stage, precision, monkeypatch):
    reductions, inputs = [], torch.randn(4, 12)
    engines = build(stage, precision), build(stage, precision)
    engines[1].model.enable_backward_allreduce = True  # as DeepSpeed would have it
    kind, reduce = type(engines[0].model), type(engines[0].model).allreduce_gradients
    monkeypatch.setattr(kind, "allreduce_gradients", lambda self: reductions.append(self) or reduce(self))
    for _ in range(3):
        for engine in engines:
            take_step(engine, precision, inputs)
    assert reductions == [engines[1].model] * 3
    assert_equal(*(everything(engine) for engine in engines))


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "bf16")])
def test_stages_that_partition_gradients_as_they_reduce_still_do(build, stage, precision):
    assert build(stage, precision).model.enable_backward_allreduce


class Without:
    """An object that lacks one attribute of another."""

    def __init__(self, whole, name):
        self._whole, self._missing = whole, name

    def __getattr__(self, name):
        if name == self._missing:
            raise AttributeError(name)
        return getattr(self._whole, name)


@pytest.mark.parametrize(
    ("stage", "precision", "layout"),
    [
        (0, "fp32", Plain),
        (0, "bf16", Unpartitioned16Bit),
        (2, "fp32", Zero1And2),
        (1, "bf16", Zero1Bf16),
        (3, "fp32", Zero3),
    ],
)
def test_a_release_that_moves_something_is_refused_by_name(build, stage, precision, layout):
    whole = build(stage, precision)
    for name in layout.internals:
        changed = layout(whole._engine)
        changed.optimizer = Without(changed.optimizer, name)
        assert missing_internals(whole._engine, changed) == [f"'{name}' in its {layout.title}"]
    for name in set(ENGINE_INTERNALS) - {"fp16_enabled", "module"}:  # which the check itself needs
        missing = missing_internals(Without(whole._engine, name), whole._layout)
        assert missing == [f"'{name}' in its engine"]


def test_a_deepspeed_that_would_reduce_leaves_by_themselves_is_missed(build):
    engine = build(3, "fp32")
    assert not engine._layout.optimizer.leaf_parameters
    engine._layout.optimizer.leaf_parameters = {engine.model: list(engine.model.parameters())}
    assert missing_internals(engine._engine, engine._layout) == ["'z3_leaf_parameter' in its runtime/zero/stage3.py"]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_padding_of_the_last_shards_is_not_held(build, monkeypatch, rank):
    """As on 3 processes, where 20 elements are shards of 7, and 3 elements shards of 1."""
    engine = build(3, "fp32")
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: rank)
    for _, parameter in engine.named_parameters():
        size = -(-parameter.ds_numel // 3)
        shard = torch.full([size], float("nan"))  # what memory that nobody wrote to may hold
        shard[: max(0, min(size, parameter.ds_numel - rank * size))] = 1.0
        parameter.ds_tensor.data = shard
        parameter.ds_tensor.ds_numel = size
    held = dict(engine.held_parameters())
    assert {name: len(values) for name, values in held.items()} == {
        "0.weight": 80,
        "0.bias": 7 if rank < 2 else 6,
        "1.weight": 20,
        "1.bias": 1,
    }
    assert all(values.isfinite().all() for values in held.values())


def test_the_sentence_names_the_attribute_and_the_version_that_has_it(build, monkeypatch):
    engine = build(2, "fp32")._engine
    monkeypatch.setattr(Zero1And2, "internals", (*Zero1And2.internals, "moved_elsewhere"))
    with pytest.raises(
        UserError, match=r"has no 'moved_elsewhere' in its optimizer for ZeRO-1 and ZeRO-2.*deepspeed==0"
    ):
        DeepSpeedEngine(engine)


def test_the_lists_are_complete():
    """Every attribute that the module takes from DeepSpeed's objects is in the list for that object."""
    optional = {"backup_optimizer", "_offload_accumulated_param_ids"}  # only with offloading; one only written to
    tree = ast.parse(SOURCE.read_text())
    for layout in LAYOUTS:
        (body,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == layout.__name__]
        taken = {
            node.attr
            for node in ast.walk(body)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("optimizer", "self.optimizer")
        }
        assert taken <= {*layout.internals, *optional}, layout.__name__
    for functions, layout in (("ZERO_1_AND_2", Zero1And2), ("ZERO_3", Zero3)):
        taken = {
            node.attr
            for part in ast.parse(SOURCES[1].read_text()).body
            if isinstance(part, ast.ClassDef | ast.FunctionDef)
            and ("ero3" in part.name or "zero_3" in part.name) == (functions == "ZERO_3")
            for node in ast.walk(part)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("optimizer", "self.optimizer")
        }
        assert taken - {"fp32_partitioned_groups_flat"} <= set(layout.internals), functions
    everything = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    of_engine = {
        node.attr for node in everything if ast.unparse(node.value) in ("engine", "self._engine", "self.engine")
    }
    assert of_engine == set(ENGINE_INTERNALS)
    assert {node.attr for node in everything if node.attr.startswith("ds_")} <= set(PARAMETER_INTERNALS)


def test_no_other_module_knows_the_insides_of_deepspeed():
    names = {*ENGINE_INTERNALS, *PARAMETER_INTERNALS, *SCALER_INTERNALS}
    names |= {name for layout in (Layout, *LAYOUTS) for name in getattr(layout, "internals", ())}
    word = re.compile(r"(\.|[\"'])(" + "|".join(sorted(names - COMMON, key=len, reverse=True)) + r")\b(?!\s*[=:])")
    found = {}
    package = Path(fastvit_engine.__file__).parent
    for path in package.rglob("*.py"):
        if path.is_relative_to(package / "config"):  # words that users bring to a configuration are no insides
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if (match := word.search(line)) and path not in SOURCES:
                found[f"{path.name}:{number}"] = match[2]
    # The names that our own configuration gives to DeepSpeed are no insides.
    assert {place: name for place, name in found.items() if not place.startswith("build.py")} == {}


def test_no_extension_is_compiled_for_a_collective_on_cpu(build):
    build(0, "fp32")
    assert module.import_deepspeed().comm.comm.cdb.shm_comm_op is None


def test_no_compiler_is_loaded_for_a_muon_that_nothing_uses(monkeypatch):
    module.import_deepspeed()
    muon = "deepspeed.runtime.zero.muon.original_muon"
    monkeypatch.delitem(sys.modules, muon, raising=False)
    assert not hasattr(importlib.import_module(muon).muon_update, "_torchdynamo_orig_callable")


def test_planning_a_run_does_not_import_deepspeed():
    program = (
        "import sys; from fastvit_engine.cli import main; "
        "code = main(['plan', 'quickstart', '--gpus', '8', '--json']); "
        "sys.exit(code or 'deepspeed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize(("verbose", "level"), [("1", logging.INFO), (None, logging.ERROR)])
def test_deepspeed_logs_what_it_does_only_if_asked(monkeypatch, verbose, level):
    monkeypatch.delenv(VERBOSE, raising=False)
    if verbose:
        monkeypatch.setenv(VERBOSE, verbose)
    import_deepspeed()
    assert logging.getLogger("DeepSpeed").level == level
