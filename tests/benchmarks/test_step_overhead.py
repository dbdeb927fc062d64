"""The benchmark's machinery on a tiny model: the variants must be the same training, or their times compare nothing."""

import importlib.metadata
import json
import multiprocessing
import re
import statistics
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch.nn import functional as F

from benchmarks import step_overhead
from benchmarks.step_overhead import VARIANTS, Case, Racer
from fastvit_engine.models import build_vit

TINY = Case(
    "tiny, 8 images",
    (
        "model={name: Ti/4, image_size: 8, num_classes: 10, width: 32, depth: 2, heads: 2}",
        "train.global_batch_size=8",
        "optimizer.learning_rate=5.0e-3",
    ),
    turn_steps=3,
    rounds=7,
    warmup_steps=4,
)


@pytest.fixture(scope="module")
def measurement():
    # In a process of its own: joining a world and DeepSpeed leave traces in the process that no other test should see.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(step_overhead.measure, [TINY]).result()[0]


def loss_on_the_resident_batches(weights):
    config = TINY.resolve(0).config
    model = build_vit(config.model, mean=config.data.mean, std=config.data.std)
    model.load_state_dict(weights)
    batches = step_overhead.resident_batches(config)
    return statistics.mean(F.cross_entropy(model(batch.images), batch.labels).item() for batch in batches)


def test_every_variant_trains(measurement):
    config = TINY.resolve(0).config
    torch.manual_seed(config.seed)
    before = build_vit(config.model, mean=config.data.mean, std=config.data.std).state_dict()
    assert set(measurement.weights) == set(VARIANTS)
    for weights in measurement.weights.values():
        assert weights.keys() == before.keys()
        assert all((weights[name] - before[name]).abs().max() > 1e-4 for name in before)
        assert loss_on_the_resident_batches(weights) < 0.75 * loss_on_the_resident_batches(before)


def test_every_variant_ends_at_the_same_weights(measurement):
    assert measurement.weight_difference < 1e-5


def test_a_weight_of_one_variant_that_differs_is_noticed(measurement):
    weights = {name: dict(values) for name, values in measurement.weights.items()}
    weights["loop-1"]["head.bias"] = weights["loop-1"]["head.bias"] + 1e-3
    changed = step_overhead.Measurement(TINY, measurement.milliseconds, weights)
    assert changed.weight_difference == pytest.approx(1e-3, rel=0.05)


def test_each_variant_has_a_time_for_each_round(measurement):
    assert set(measurement.milliseconds) == set(VARIANTS)
    for times in measurement.milliseconds.values():
        assert len(times) == TINY.rounds
        assert all(0 < time < 10_000 for time in times)


def test_json_and_markdown_agree(measurement, tmp_path):
    environment = step_overhead.describe_machine("the command")
    step_overhead.write(
        {"environment": environment, "cases": [step_overhead.summarize(measurement)]}, tmp_path / "results" / "cpu"
    )
    results = json.loads((tmp_path / "results" / "cpu" / "step_overhead.json").read_text())
    text = (tmp_path / "results" / "cpu" / "step_overhead.md").read_text()
    assert results["environment"]["command"] == "the command"
    assert results["environment"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert "`the command`" in text and results["environment"]["cpu"] in text
    assert "## tiny, 8 images" in text
    times = results["cases"][0]["milliseconds"]
    assert times == measurement.milliseconds
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")
    ]
    assert [(row[0], row[3]) for row in rows] == [(name, against or "") for name, against in step_overhead.COMPARISONS]
    for variant, median, quartiles, against, over, _, share, _ in rows:
        ordered = sorted(times[variant])  # of seven times the middle one is the median
        assert float(median) == pytest.approx(ordered[3], abs=0.006)
        low, high = map(float, re.fullmatch(r"([\d.]+) to ([\d.]+)", quartiles).groups())
        assert low == pytest.approx((ordered[1] + ordered[2]) / 2, abs=0.006)
        assert high == pytest.approx((ordered[4] + ordered[5]) / 2, abs=0.006)
        if against:
            pairs = list(zip(times[variant], times[against], strict=True))
            assert float(over) == pytest.approx(sorted(a - b for a, b in pairs)[3], abs=0.006)
            assert float(share) == pytest.approx(sorted(100 * (a / b - 1) for a, b in pairs)[3], abs=0.06)


def test_a_turn_is_timed_from_the_first_batch_to_the_request_after_the_last(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(step_overhead, "perf_counter", lambda: clock[0])
    seen = []

    def train():
        clock[0] += 100  # set-up
        for step, batch in zip(range(6), racer.batches, strict=False):
            seen.append(batch)
            clock[0] += 1 + step
        clock[0] += 100  # the end
        return {}

    racer = Racer(["a", "b", "c"])
    racer.start(train)
    assert seen == []
    assert racer.take_turn(2) == 1 + 2
    assert racer.take_turn(3) == 3 + 4 + 5
    assert racer.finish() == {}
    assert "".join(seen) == "abcabc"


def test_an_error_of_a_training_loop_reaches_the_benchmark():
    def train():
        next(racer.batches)
        raise RuntimeError("out of luck")

    racer = Racer(["a"])
    racer.start(train)
    with pytest.raises(RuntimeError, match="out of luck"):
        racer.take_turn(1)
