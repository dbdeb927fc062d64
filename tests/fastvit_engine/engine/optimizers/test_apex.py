"""AdamW and LAMB by the kernels of apex: the same updates and the same state, and where they are refused.

What stands for apex here computes the same on a CPU: its kernels themselves have not been run.
"""

import sys

import pytest
import torch

from fastvit_engine.config import Config, load_config
from fastvit_engine.config.checks import check_config
from fastvit_engine.data.stream.batch_split import BatchSplit
from fastvit_engine.engine.build import deepspeed_config
from fastvit_engine.engine.deepspeed import initialize
from fastvit_engine.engine.optimizers.apex import CLASSES, ApexOptimizer, check_apex
from fastvit_engine.engine.optimizers.kinds import build_optimizer, updates_in_place
from fastvit_engine.errors import UserError
from fastvit_engine.nvidia_apex import EXTENSIONS
from fastvit_engine.sizing.defaults import choose
from fastvit_engine.sizing.machine import Machine
from tests.fastvit_engine.engine.optimizers import fused
from tests.fastvit_engine.engine.test_learning import LABELS, MODEL, build_model, masters, train

DECAY = 0.1


def config(kind, stage=0, precision="fp32", kernels="apex", **sections):
    zero = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 500} if stage == 3 else {}
    return Config.model_validate(
        {
            "model": MODEL,
            "optimizer": {"kind": kind, "kernels": kernels, "weight_decay": DECAY},
            "train": {"global_batch_size": len(LABELS), "precision": precision, "grad_clip": None},
            "zero": {"stage": stage},
            "deepspeed": {"zero_optimization": zero} if zero else {},
            **sections,
        }
    )


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages that come first, in which there is no apex yet."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("apex", "amp_C"):
            del sys.modules[name]


@pytest.fixture
def apex(site):
    """NVIDIA's apex, as far as it can be seen from its files."""
    for name in ("apex/__init__.py", "apex/multi_tensor_apply/__init__.py", "apex/optimizers/__init__.py", "amp_C.py"):
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for module, name, _ in CLASSES.values():
        path = site / f"{module.replace('.', '/')}.py"
        path.write_text(f"from {fused.__name__} import {name}\n")
    return site


@pytest.fixture
def build(lone_world):
    """build(config) -> an engine of DeepSpeed, as a process that has a GPU would build it."""
    engines = []

    def make(settings):
        model = build_model(settings)
        optimizer = build_optimizer(model, settings, on_gpu=settings.optimizer.kernels == "apex")
        engines.append(initialize(model, optimizer, deepspeed_config(settings, BatchSplit(len(LABELS), 1, 1))))
        engines[-1].model.train()
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def assert_near(found, expected, tolerance):
    """Leaves out biases of keys: their gradient is zero but for rounding, which Adam scales up to whole steps."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        difference = (found[name] - values).abs()
        if name.endswith("qkv.bias"):
            query, _, value = difference.chunk(3)
            difference = torch.cat([query, value])
        assert difference.max() < tolerance, name


@pytest.mark.parametrize(
    ("kind", "stage", "precision"),
    [("adamw", 0, "fp32"), ("adamw", 1, "bf16"), ("adamw", 2, "fp32"), ("adamw", 3, "fp32"), ("lamb", 0, "fp32"),
     ("lamb", 0, "bf16"), ("adamw", 0, "bf16")],
)  # fmt: skip
def test_weights_and_state_are_those_of_the_engines_own_kernels(apex, build, kind, stage, precision):
    of_apex, own = (build(config(kind, stage, precision, kernels)) for kernels in ("apex", "torch"))
    before, builds = masters(own), fused._Fused.__subclasses__()
    assert before.keys() == masters(of_apex).keys() and of_apex.optimizer_state() == {}
    counts = [one.built for one in builds]
    for engine in (of_apex, own):
        train(engine)
    assert [one.built for one in builds] != counts
    tolerance = 1e-5 if precision == "fp32" else 0.02
    assert_near(masters(of_apex), masters(own), tolerance)
    moved = max(float((values - before[name]).abs().max()) for name, values in masters(own).items())
    assert moved > 10 * tolerance / (1 if precision == "fp32" else 10)
    assert of_apex.scalars() == own.scalars() == {"optimizer.step": 5.0}
    states = [engine.optimizer_state() for engine in (of_apex, own)]
    assert states[0].keys() == states[1].keys() == {"exp_avg", "exp_avg_sq"}
    shapes = [[(part.name, part.start, part.values.shape) for part in state["exp_avg"]] for state in states]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("kind", "stage"), [("adamw", 1), ("lamb", 0)])
@pytest.mark.parametrize(("first", "second"), [("torch", "apex"), ("apex", "torch")])
def test_either_kernels_continue_from_the_state_of_the_other(apex, build, kind, stage, first, second):
    alone, before, after = (build(config(kind, stage, "fp32", kernels)) for kernels in (second, first, second))
    train(alone, 4)
    train(before, 2)
    kinds = {name: {part.name for part in slices} for name, slices in before.optimizer_state().items()}
    after.prepare_optimizer(kinds, before.scalars())
    states = [{"weight": engine.master_weights(), **engine.optimizer_state()} for engine in (before, after)]
    with torch.no_grad():
        for name, slices in states[0].items():
            for one, other in zip(slices, states[1][name], strict=True):
                other.values.copy_(one.values)
    after.publish()
    train(after, 2)
    train(before, 2)  # at the same rates as `after`
    assert_near(masters(after), masters(before), 1e-5)
    assert after.scalars() == alone.scalars() == {"optimizer.step": 4.0}


def test_an_update_that_is_not_approved_changes_nothing(apex, build):
    engine = build(config("adamw"))
    train(engine, 2)
    before, scalars = masters(engine), engine.scalars()
    state = [part.values.clone() for part in engine.optimizer_state()["exp_avg"]]
    engine.approve_updates(lambda norm: False)
    train(engine, 1)
    assert_near(masters(engine), before, 1e-30)
    assert engine.scalars() == scalars
    assert all(torch.equal(a, b.values) for a, b in zip(state, engine.optimizer_state()["exp_avg"], strict=True))


def test_deepspeed_does_not_take_it_for_one_of_the_classes_that_it_knows(apex):
    """It would then choose another of its own optimizers around it, whose state lies elsewhere."""
    built = build_optimizer(build_model(config("adamw")), config("adamw"), on_gpu=True)
    assert isinstance(built, ApexOptimizer) and not isinstance(built, fused.FusedAdam)


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_without_a_gpu_or_without_apex_it_is_refused(site, kind):
    name = CLASSES[kind].name
    with pytest.raises(UserError, match=f"^optimizer.kernels = apex: {name} needs a GPU: set optimizer.kernels=torch"):
        build_optimizer(build_model(config(kind)), config(kind), on_gpu=False)
    (site / "apex").mkdir()
    (site / "apex" / "__init__.py").write_text("raise SystemExit('imported')")
    with pytest.raises(UserError, match=r"is not NVIDIA's .*, or set optimizer\.kernels=torch$"):
        check_apex(config(kind), on_gpu=True)
    check_apex(config(kind, kernels="torch"), on_gpu=False)


def test_an_apex_of_another_pytorch_is_refused_in_a_sentence(apex):
    (apex / "apex" / "optimizers" / "fused_adam.py").write_text("raise ImportError('undefined symbol: _ZN\\nmore')")
    with pytest.raises(UserError, match=r"does not import \(ImportError: undefined symbol: _ZN\): build apex again"):
        check_apex(config("adamw"), on_gpu=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optimizer.kind=lion"], "has none for optimizer.kind = lion: set optimizer.kernels=torch"),
        (["zero.stage=1", "zero.offload=optimizer"], "zero.offload = optimizer keeps the optimizer's state in host"),
        (["optimizer.kind=lamb", "zero.stage=1"], "FusedLAMB takes the norms of the tensors .* which is 1, or"),
        (["optimizer.kind=lamb", "zero.stage=auto"], "set zero.stage=0, which is auto"),
        (["optimizer.kind=lamb", "zero.stage=0", "optimizer.weight_decay=0"], "updates only, and optimizer.weight_dec"),
        (["optimizer.kind=lamb", "zero.stage=0", "optimizer.head_weight_decay=0"], "and optimizer.head_weight_decay"),
    ],
)
def test_what_apex_would_compute_otherwise_is_refused(settings, message):
    with pytest.raises(UserError, match=f"^optimizer.kernels = apex.*{message}"):
        check_config(load_config("quickstart", ["optimizer.kernels=apex", *settings]).config)


@pytest.mark.parametrize("settings", [["zero.stage=2"], ["zero.stage=0", "optimizer.kind=lamb"]])
def test_what_apex_computes_alike_is_taken(settings):
    check_config(load_config("quickstart", ["optimizer.kernels=apex", *settings]).config)


def test_a_run_says_at_its_start_what_updates_the_weights():
    machine = Machine(2, 2, 80 * 2**30, on_gpu=True)
    for kind, name in (("adamw", "FusedAdam"), ("lamb", "FusedLAMB")):
        lines = choose(config(kind), machine).describe().splitlines()
        assert f"  optimizer.kernels = apex: {name} of NVIDIA's apex updates the weights" in lines
    assert "optimizer.kernels" not in choose(config("adamw", kernels="torch"), machine).describe()


def test_memory_counts_no_copies_for_kernels_that_update_in_place():
    assert updates_in_place(config("lamb").optimizer, on_gpu=True)
    assert not updates_in_place(config("lamb").optimizer, on_gpu=False)
    assert not updates_in_place(config("lamb", kernels="torch").optimizer, on_gpu=True)
    assert updates_in_place(config("adamw", kernels="torch").optimizer, on_gpu=True)


def test_doctor_knows_the_modules():
    assert {one.module for one in CLASSES.values()} <= EXTENSIONS.keys()
