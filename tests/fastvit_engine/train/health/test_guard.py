import math

import numpy as np
import pytest
import torch
from torch import nn

from fastvit_engine.config import Config, HealthConfig
from fastvit_engine.data.stream.batch_split import BatchSplit
from fastvit_engine.engine.build import build_engine
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.train.health.guard import Anomaly, Guard
from tests.fastvit_engine.plain_engine import PlainEngine
from tests.fastvit_engine.ranks import on_ranks

HEALTH = HealthConfig(spike_window=20)


def guarded(world, health=HEALTH, precision="fp32"):
    """A step without DeepSpeed: `step(loss, norm)` is the verdict, and how far the one weight moved."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    engine = PlainEngine(model)
    guard = Guard(engine, world, health, precision)

    def step(loss, norm=1.0, **options):
        before = model.weight.item()
        model.weight.grad = torch.ones(1, 1)
        engine.norm = norm
        guard.expect(torch.tensor(loss), **options)
        engine.step()
        return guard.report(), model.weight.item() - before

    return guard, step


def on_one(function):
    return on_ranks(1, function)[0]


def test_the_verdict_is_about_the_sum_and_the_same_on_all_ranks():
    def of_rank(world):
        guard, step = guarded(world)
        guard.flag = float(world.rank == 2)
        healthy = step(float(world.rank))
        ill = step(float("nan") if world.rank == 1 else 2.0)
        return healthy, ill

    for (healthy, moved), (ill, stayed) in on_ranks(3, of_rank):
        assert (healthy.loss, healthy.grad_norm, healthy.flags, healthy.anomaly) == (1.0, 1.0, 1.0, None)
        assert moved == -1
        assert ill.anomaly.kind == "loss"
        assert stayed == 0


def test_gradients_that_are_not_finite():
    assert on_one(lambda world: guarded(world)[1](2.0, math.inf))[0].anomaly.kind == "gradient"


def test_an_overflow_of_fp16_is_the_loss_scalers_business():
    guard, step = on_one(lambda world: guarded(world, precision="fp16"))
    assert step(2.0, math.inf)[0].anomaly is None
    assert len(guard.recent) == 0
    assert step(math.inf, math.inf)[0].anomaly.kind == "loss"


def test_a_fault_found_elsewhere_and_a_rehearsal_change_nothing():
    guard, step = on_one(guarded)
    fault = Anomaly("replicas", "weights differ")
    assert step(2.0, fault=fault)[0].anomaly == fault
    assert step(2.0, rehearsal=True) == (step(2.0)[0], 0)
    assert len(guard.recent) == 1


def noise(steps=400):
    draws = np.random.default_rng(0)
    losses = 2 + 3 * np.exp(-np.arange(steps) / 50) + 0.1 * draws.standard_normal(steps)
    return zip(losses.tolist(), np.exp(0.4 * draws.standard_normal(steps)).tolist(), strict=True)


def test_noise_is_no_spike_and_spikes_are():
    _, step = on_one(guarded)
    for loss, norm in noise():
        assert step(loss, norm)[0].anomaly is None
    report, moved = step(2.0 * 5, 1.0)
    assert (report.anomaly.kind, moved) == ("loss spike", 0)
    assert 3 < report.anomaly.limit < 6
    assert step(2.0, 50.0)[0].anomaly.kind == "gradient spike"
    assert step(2.1, 1.0)[0].anomaly is None


@pytest.mark.parametrize(
    ("losses", "norms", "loss_limit", "norm_limit"),
    [
        ((1.9, 2.1), (1.0, 3.0), 2 + 20 * 0.1, 2 + 20 * 1.0),  # of the spread
        ((2.0, 2.0), (2.0, 2.0), 2 + 20 * 0.05, 2 + 20 * 1.0),  # of the floors
        ((1.0, 3.0), (1.0, 9.0), 2 + 20 * 1.0, 5 + 20 * 4.0),
    ],
)
def test_a_spike_is_above_twenty_times_the_spread_over_the_median(losses, norms, loss_limit, norm_limit):
    guard, step = on_one(lambda world: guarded(world, HealthConfig(spike_window=20)))
    guard.forget([(losses[number % 2], norms[number % 2]) for number in range(20)])
    for loss, norm, limit in ((loss_limit + 0.01, 2.0, loss_limit), (2.0, norm_limit + 0.01, norm_limit)):
        assert step(loss, norm)[0].anomaly.limit == pytest.approx(limit)
    assert step(loss_limit - 0.01, norm_limit - 0.01)[0].anomaly is None


@pytest.mark.parametrize("health", [HEALTH, HealthConfig(spike_threshold=None, spike_window=20)])
def test_no_spike_before_the_window_is_full_or_where_they_are_let_pass(health):
    _, step = on_one(lambda world: guarded(world, health))
    steps = HEALTH.spike_window if health == HEALTH else 60
    for number in range(steps):
        assert step(1e4 if number == steps - 1 else 2.0)[0].anomaly is None


def test_going_back_forgets_what_came_after():
    guard, step = on_one(guarded)
    for loss, norm in noise(100):
        step(loss, norm)
    guard.forget([(2.0, 1.0)] * 5)
    assert step(1e4)[0].anomaly is None
    assert list(guard.recent)[:5] == [(2.0, 1.0)] * 5


@pytest.mark.parametrize("recording", ["quickstart"])
def test_the_defaults_do_not_fire_on_recorded_runs(request, recording):
    path = request.config.rootpath / "benchmarks" / "results" / recording / "metrics.jsonl"
    _, step = on_one(lambda world: guarded(world, HealthConfig(spike_window=10)))
    for row in read_metrics(path)[0]:
        assert step(row["loss"], row["grad_norm"])[0].anomaly is None


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [
        *((stage, precision, "none") for stage in range(4) for precision in ("fp32", "bf16")),
        (2, "fp32", "optimizer"),
        (3, "bf16", "all"),
    ],
)
def test_a_discarded_step_leaves_deepspeed_as_if_it_had_not_been(lone_world, stage, precision, offload):
    """In every ZeRO stage, at the first step and at a later one, and whatever is wrong."""
    config = Config.model_validate(
        {
            "train": {"precision": precision, "global_batch_size": 8, "grad_clip": 1.0},
            "zero": {"stage": stage, "offload": offload},
            "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100}},
        }
    )

    def final_weights(faults):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 3))
        engine = build_engine(model, config, BatchSplit(8, 1, 2), lone_world)
        guard = Guard(engine, lone_world, config.health, precision)
        data = torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
        first = engine.named_parameters()[0][1]

        def step(number, what=None):
            hook = first.register_hook(lambda grad: grad * math.nan) if what == "gradient" else None
            for micro in range(2):
                loss = engine.model(data[number, micro * 4 : micro * 4 + 4]).float().square().mean()
                engine.backward(loss * math.nan if what == "loss" else loss)
                if micro == 1:
                    fault = Anomaly("replicas", "differ") if what == "fault" else None
                    guard.expect(loss.detach(), fault=fault, rehearsal=what == "rehearsal")
                engine.step()
            if hook:
                hook.remove()
            assert (guard.report().anomaly is not None) == (what in ("loss", "gradient", "fault"))

        for number in range(4):
            for what in faults if number in (0, 2) else ():
                step(number, what)
            step(number)
        held = [held.float().clone() for _, held in engine.held_parameters()]
        engine.close()
        return torch.cat([weight.flatten() for weight in held])

    undisturbed = final_weights([])
    assert undisturbed.isfinite().all()
    assert torch.equal(final_weights(["fault", "loss", "gradient", "rehearsal"]), undisturbed)
