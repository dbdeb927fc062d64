"""Variants that take every step in turn: what is measured of each, and what becomes of one that fails."""

import pytest
import torch

from benchmarks import side_by_side
from benchmarks.registry import Unusable
from benchmarks.shapes import CPU_SHAPES
from benchmarks.side_by_side import WARM_UP, Footprint, batches, faster, measure
from benchmarks.train_variants import Setup, Step

CPU = torch.device("cpu")


def test_batches_are_the_same_in_every_run_and_can_be_learned():
    first, again = (next(batches(CPU_SHAPES[0], 3, CPU)) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert first[0].shape == (3, 224, 224, 3) and first[0].dtype == torch.uint8
    given = batches(CPU_SHAPES[0], 3, CPU)
    assert not torch.equal(next(given)[0], next(given)[0])


@pytest.fixture
def alone(monkeypatch):
    for name, value in side_by_side.ALONE.items():
        monkeypatch.setenv(name, value)


def test_all_take_every_step_in_turn_and_a_failure_stops_its_variant_alone(alone):
    seen: list[str] = []

    def variant(name: str, fails_at: int | None = None):
        def build(setup: Setup) -> Step:
            def step(images, labels):
                seen.append(name)
                if seen.count(name) == fails_at:
                    raise RuntimeError("no kernel\nimage")
                return images.float().mean()

            return step

        return build

    def absent(setup: Setup) -> Step:
        raise Unusable("torchao is not installed")

    steps = WARM_UP + 2
    builds = {"a": variant("a"), "b": variant("b", fails_at=WARM_UP + 2), "c": absent}
    found = measure(builds, CPU_SHAPES[0], 2, steps, 600)["variants"]
    assert seen[:4] == ["a", "b", "b", "a"]  # the first one changes
    assert len(found["a"]["losses"]) == steps and len(found["a"]["ms"]) == len(found["a"]["host_ms"]) == 2
    assert found["a"]["losses"][:WARM_UP] == found["b"]["losses"][:WARM_UP] and found["a"]["memory_bytes"] is None
    assert (found["b"]["reason"], found["b"]["failed"]) == ("RuntimeError: no kernel image", True)
    assert len(found["b"]["ms"]) == 1
    assert (found["c"]["reason"], found["c"]["failed"]) == ("torchao is not installed", False)


def test_no_step_begins_after_the_time_is_up(alone):
    found = measure({"a": lambda setup: lambda images, labels: labels.float().mean()}, CPU_SHAPES[0], 2, 9, 0)
    assert found["variants"]["a"]["losses"] == []


def test_a_footprint_is_that_of_one_variant_alone(monkeypatch):
    there = {"now": 1000, "peak": 1000}  # what other variants have

    def allocate(count: int) -> None:
        there["now"] += count
        there["peak"] = max(there["peak"], there["now"])

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: there["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: there["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: there.update(peak=there["now"]))
    shared = {"segment_pool_id": (0, 0), "total_size": 900, "allocated_size": 0}
    graph = {"segment_pool_id": (0, 1), "total_size": 0, "allocated_size": 0}
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [shared, graph])
    footprint = Footprint()
    assert footprint.of(lambda: allocate(100)) == 100  # is built
    allocate(500)  # by another
    assert footprint.of(lambda: (allocate(70), allocate(-40))) == 170  # keeps 30 of them, the optimizer's
    assert footprint.of(lambda: (allocate(70), allocate(-70))) == 200
    assert footprint.of(lambda: None) == 200
    assert footprint.of(lambda: graph.update(total_size=300, allocated_size=100) or allocate(100)) == 430


def test_ratios_are_of_pairs():
    base, row = {"ms": [200.0, 300.0, 100.0]}, {"ms": [100.0, 150.0, 80.0]}
    assert faster(base, row) == 2.0
    assert faster({"ms": []}, row) is None
