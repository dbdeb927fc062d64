"""The engine's shorter ways for gradients against DeepSpeed's own: the same training, in fewer copies."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit_engine.engine.deepspeed import initialize
from fastvit_engine.engine.deepspeed_gradients import (
    UnshardedZero3,
    WholeGradients,
    _Flattened,
    _Place,
    sum_of_squares,
)
from tests.fastvit_engine.engine.taught_engine import teach
from tests.fastvit_engine.warm_rank import run_program
from tests.fastvit_engine.warm_ranks import exit_codes_of

PROGRAM = Path(__file__).with_name("taught_engine.py")


@pytest.fixture
def build(lone_world):
    engines = []

    def make(stage, precision="fp32", **zero):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 300), nn.GELU(), nn.Linear(300, 8))
        settings = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 1.0,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000, "overlap_comm": False, **zero},
            "bf16": {"enabled": precision == "bf16"},
            **({"data_types": {"grad_accum_dtype": "fp32"}} if precision != "fp32" else {}),
        }
        engines.append(initialize(model, torch.optim.AdamW(model.parameters(), fused=True), settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


CASES = [(1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")]


def assert_alike(own, stock):
    """Losses, norms and weights. What differs is the order in which a norm, and a product's bias, are added up."""
    assert own.keys() == stock.keys()
    for name, values in own.items():
        assert values == pytest.approx(stock[name], rel=2e-5, abs=2e-6), name


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_one_process_trains_as_by_deepspeeds_own_way(lone_world, stage, precision):
    """Several micro-batches, clipping, a step that is not approved, one that is dropped, and a layer left out."""
    own, stock = (teach(stage, precision, shortened=shortened) for shortened in (True, False))
    if precision == "bf16" and stage == 3:  # another product of matrices, in 16 bits
        assert own["losses"] == pytest.approx(stock["losses"], rel=2e-2)
    else:
        assert_alike(own, stock)


@pytest.mark.distributed
def test_two_processes_train_as_by_deepspeeds_own_way(tmp_path):
    log = tmp_path / "log"
    run = partial(run_program, PROGRAM.read_text(), json.dumps(CASES))
    assert exit_codes_of([], 2, log, before=run) == [0, 0], log.read_text()
    lines = [json.loads(line[7:]) for line in log.read_text().splitlines() if line.startswith("taught ")]
    assert len(lines) == 2 * len(CASES)
    for own, stock in zip(lines[::2], lines[1::2], strict=True):
        assert own["sent"] == stock["sent"]  # the same messages, of the same bytes, in the same order
        assert len(own["sent"]) > 0
        assert_alike(*({key: of[key] for key in of if key != "sent"} for of in (own, stock)))


class Copies(TorchDispatchMode):
    """Counts what passes over tensors at least as large as half of the gradients: by operation, in elements."""

    def __init__(self):
        super().__init__()
        self.elements = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        result = operation(*arguments, **(named or {}))
        if isinstance(result, torch.Tensor):
            self.elements[operation.overloadpacket.__name__] += result.numel()
        return result


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_is_copied_once_and_its_norm_is_taken_once(build, stage, monkeypatch):
    """Counted between a backward pass and the update; the update itself copies the master weights to the model's."""
    engine = build(stage)
    engine.backward(engine.model(torch.ones(4, 64)).square().mean())
    engine.step()
    whole = sum(values.numel() for _, values in engine.held_parameters())
    norms = []
    norm = torch.linalg.vector_norm
    monkeypatch.setattr(
        torch.linalg, "vector_norm", lambda values, *a, **k: norms.append(values.numel()) or norm(values, *a, **k)
    )
    loss = engine.model(torch.ones(4, 64)).square().mean()
    with Copies() as copies:
        engine.backward(loss)
        engine.step()
    copied = sum(copies.elements[name] for name in ("copy_", "_to_copy", "cat", "clone"))
    assert 2 * whole <= copied < 2.05 * whole  # one of the gradients, one of the weights
    assert whole <= sum(norms) < 1.01 * whole
    assert engine._layout.shorter is not None


@pytest.mark.parametrize(
    "asked",
    [
        {"stage": 1, "overlap_comm": True},
        {"stage": 1, "contiguous_gradients": False},
        {"stage": 2, "reduce_scatter": False},
        {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    ],
    ids=str,
)
def test_settings_that_ask_for_another_way_get_deepspeeds_own(build, asked):
    engine = build(**asked)
    assert engine._layout.shorter is None
    before = [part.values.clone() for part in engine.master_weights()]
    engine.backward(engine.model(torch.ones(4, 64)).square().mean())
    engine.step()
    assert not all(torch.equal(part.values, old) for part, old in zip(engine.master_weights(), before, strict=True))


def test_each_stage_has_its_way(build):
    kinds = [type(build(stage)._layout.shorter) for stage in (1, 2, 3)]
    assert kinds == [WholeGradients, WholeGradients, UnshardedZero3]


def test_stage_3_on_one_process_has_no_hooks_of_modules_left(build):
    linear = nn.functional.linear
    engine = build(3)
    assert nn.functional.linear is linear
    assert not any(part._forward_hooks or part._backward_hooks for part in engine._engine.module.children())


def test_a_parameter_larger_than_a_bucket_is_cut_where_its_owner_changes():
    place = _Place(nn.Parameter(torch.zeros(100)), 0, 30, 40)  # elements 30 to 130; owners change at 40, 80, 120
    assert list(place.cuts(45)) == [(0, 50), (50, 100)]
    assert list(place.cuts(20)) == [(0, 50), (50, 90), (90, 100)]
    assert [place.share(rank) for rank in range(4)] == [(30, 40), (40, 80), (80, 120), (120, 130)]


def test_sums_of_squares_are_exact_however_many_numbers_there_are():
    values = torch.rand(3_000_001, generator=torch.Generator().manual_seed(1)) + 0.5
    exact = values.double().square().sum().item()
    assert sum_of_squares(values).item() == pytest.approx(exact, rel=1e-7)
    assert torch.linalg.vector_norm(values).item() ** 2 != pytest.approx(exact, rel=1e-6)  # in fp32 alone
    values[7] = float("nan")
    assert sum_of_squares(values).isnan()


def test_tensors_end_to_end_are_flattened_without_a_copy():
    flatten, whole = _Flattened(torch.cat), torch.arange(10.0)
    assert flatten([whole[2:5], whole[5:9]]).data_ptr() == whole[2:].data_ptr()
    assert flatten([whole[2:5], whole[5:9]]).tolist() == whole[2:9].tolist()
    for apart in ([whole[2:5], whole[6:9]], [whole[5:9], whole[2:5]], [whole[2:5], whole[5:9].clone()]):
        copied = flatten(apart)
        assert copied.tolist() == torch.cat(apart).tolist()
        assert copied.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
