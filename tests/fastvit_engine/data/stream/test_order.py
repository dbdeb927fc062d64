"""The promise of the order, on random data sets, lanes, windows, world sizes and stops."""

import subprocess
import sys
import zlib
from collections import Counter
from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvit_engine.data.shards.index import _HEADER, write_columns
from fastvit_engine.data.stream.order import CYCLE, Order, SourceOrder, choose_lanes, share_slots

counts_of_shards = st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(lambda counts: sum(counts) >= 30)


def _order(counts, *, seed=0, lanes=1, window=10, source=0) -> SourceOrder:
    return SourceOrder(np.asarray(counts), seed=seed, lanes=lanes, window=window, source=source)


def _samples(order: SourceOrder | Order, positions) -> list[tuple[int, ...]]:
    """(shard, row), or (source, shard, row), of each position."""
    located = order.locate(np.asarray(positions, dtype=np.int64))
    columns = located[:3] if isinstance(order, Order) else located[:2]
    return list(zip(*(column.tolist() for column in columns), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    counts_of_shards,
    st.integers(0, 2**64),
    st.sampled_from([1, 2, 3, 5, 8, 16, 30]),
    st.sampled_from([1, 2, 7, 64, 1000]),
)
def test_an_epoch_holds_no_sample_twice_and_leaves_out_fewer_than_lanes(counts, seed, lanes, window):
    order = _order(counts, seed=seed, lanes=lanes, window=window)
    everything = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    length = order.samples_per_epoch
    assert length > sum(counts) - lanes
    for epoch in range(3):
        seen = _samples(order, np.arange(epoch * length, (epoch + 1) * length))
        assert len(set(seen)) == length and set(seen) <= everything


@settings(max_examples=60, deadline=None)
@given(
    counts_of_shards,
    st.sampled_from([1, 4, 30]),
    st.sampled_from([1, 9, 500]),
    st.sampled_from([24, 48]),
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from([1, 2, 3, 8])), min_size=1, max_size=5),
)
def test_stopping_and_another_world_size_change_no_step(counts, lanes, window, batch, stretches):
    """Each stretch starts anew at the step where the one before stopped, on another number of ranks."""
    whole = _order(counts, lanes=lanes, window=window)
    consumed = 0
    for steps, world_size in stretches:
        ranks = [_order(counts, lanes=lanes, window=window) for _ in range(world_size)]
        for start in range(consumed, consumed + steps * batch, batch):
            own = [
                _samples(ranks[rank], np.arange(start + rank, start + batch, world_size)) for rank in range(world_size)
            ]
            expected = _samples(whole, np.arange(start, start + batch))
            assert [own[i % world_size][i // world_size] for i in range(batch)] == expected
        consumed += steps * batch


def test_what_an_epoch_leaves_out_differs_even_with_one_shard():
    order = _order([99], lanes=10)
    everything = {(0, row) for row in range(99)}
    left_out = [everything - set(_samples(order, np.arange(e * 90, e * 90 + 90))) for e in range(20)]
    assert {len(left) for left in left_out} == {9}
    assert len(set.union(*left_out)) > 50


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=5), st.integers(0, 5), st.integers(0, 1000))
def test_shares_of_a_mixture_are_exact_in_every_cycle(weights, seed, cycle):
    slots = share_slots(weights)
    assert sum(slots) == CYCLE
    assert all(abs(s - w / sum(weights) * CYCLE) < 1 for s, w in zip(slots, weights, strict=True))
    sources = [_order([50, 51 + n], seed=seed, lanes=4, source=n) for n in range(len(weights))]
    places = Order(sources, slots, seed).locate(np.arange(cycle * CYCLE, (cycle + 1) * CYCLE))
    assert np.bincount(places.source, minlength=len(slots)).tolist() == slots
    for number, source in enumerate(sources):  # each runs through its own epochs without a gap
        own = places.source == number
        inside = places.epoch[own] * source.samples_per_epoch + places.position[own]
        assert inside.tolist() == list(range(cycle * slots[number], (cycle + 1) * slots[number]))
        again = source.locate(inside)
        assert np.array_equal(again[0], places.shard[own]) and np.array_equal(again[1], places.row[own])


def test_one_source_is_the_plain_case():
    alone = _order([30, 41, 17], seed=3, lanes=4)
    mixture = Order([_order([30, 41, 17], seed=3, lanes=4)], share_slots([0.3]), 3)
    positions = np.arange(500)
    assert [sample[1:] for sample in _samples(mixture, positions)] == _samples(alone, positions)


def test_samples_of_a_batch_come_from_everywhere():
    """Shards in the order of their classes: the worst case for a batch that reads from few places."""
    order = _order([1000] * 100, lanes=choose_lanes(100_000), window=1024)
    batches = order.locate(np.arange(64 * 256))[0].reshape(64, 256)
    distinct = np.mean([len(np.unique(batch)) for batch in batches])
    assert distinct > 0.95 * 100 * (1 - np.exp(-2.56))  # of what uniform draws would give
    small = order.locate(np.arange(64 * 16))[0].reshape(64, 16)  # a batch smaller than the lanes
    assert np.mean([len(np.unique(batch)) for batch in small]) > 13
    lane = order.locate(np.arange(0, 500) * 256)[0]  # while a lane reads few shards
    assert len(np.unique(lane)) <= 3


@pytest.mark.parametrize(("samples", "lanes"), [(1, 1), (199, 1), (200, 2), (1438, 8), (25_600, 256), (10**9, 256)])
def test_lanes_that_fit_the_samples(samples, lanes):
    assert choose_lanes(samples) == lanes


def test_orders_differ_by_seed_epoch_and_source():
    positions = np.arange(200)
    orders = [_order([100, 100], lanes=2, **given) for given in ({}, {"seed": 1}, {"source": 1})]
    found = [tuple(_samples(order, positions)) for order in orders]
    found.append(tuple(_samples(orders[0], positions + 200)))
    assert len(set(found)) == 4


def test_the_order_is_the_one_that_runs_were_started_with():
    """A run must find its place again with every later version of the engine and of NumPy."""
    orders = [_order([100] * 30 + [7, 0, 1], seed=5, lanes=16, window=64), _order([300], seed=5, lanes=2, source=1)]
    places = Order(orders, share_slots([3, 1]), 5).locate(np.arange(20_000))
    digest = blake2b(np.stack(places).astype("<i8").tobytes(), digest_size=8).hexdigest()
    assert digest == "14617da1b1fa9348"
    assert Counter(places.source.tolist()) == {0: 15_000, 1: 5_000}


def test_large_seeds_keep_all_their_digits():
    places = [_order([50] * 20, seed=2**64 - n, lanes=2, window=50).locate(np.arange(40)) for n in (1, 2, 3)]
    assert len({np.stack(place).tobytes() for place in places}) == 3


LARGE = r"""
import re, sys, time
from pathlib import Path
import numpy as np
from fastvit_engine.data.shards.index import open_index
from fastvit_engine.data.stream.order import Order, SourceOrder

def go_on_at(step):
    index = open_index(Path(sys.argv[1]))
    order = Order([SourceOrder(index.counts, seed=0, lanes=256, window=1024)], [1], 0)
    places = order.locate(np.arange(step * 4096 + 3, (step + 1) * 4096, 8))  # of rank 3 of 8
    index.extents(places.shard, places.row)
    return order

def seconds(function):
    began = time.process_time()
    function()
    return time.process_time() - began

steps = [0, 1, 73_000, 1_000_000, 73_242 * 90 - 1]
order = go_on_at(7)
batches = [np.arange(4096) + 4096 * step for step in range(8, 58)]
print(max(seconds(lambda: go_on_at(step)) for step in steps),
      np.median([seconds(lambda: order.locate(batch)) for batch in batches]),
      re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])  # ru_maxrss begins with the parent's
"""


def test_300_million_samples_cost_no_time_and_no_memory(tmp_path):
    """30,000 shards of 10,000 samples; the index's numbers are zeros, which take no room on disk."""
    shards, samples = 30_000, 10_000
    one_each = {name: [1] * shards for name in ("sizes", "ends", "stamps", "fingerprints", "labels", "label_counts")}
    columns = {**one_each, "counts": [samples] * shards, "unlabelled": [0] * shards}
    columns["label_ends"] = list(range(1, shards + 1))
    columns["start_checksums"] = [zlib.crc32(bytes(4 * samples))] * shards
    path = tmp_path / "shards.index"
    with open(path, "wb") as file:
        file.truncate(_HEADER.size + 4 * shards * samples)
        file.seek(0, 2)
        write_columns(file, columns, [f"train-{n:06d}.tar" for n in range(shards)], "cls")
    output = subprocess.run([sys.executable, "-c", LARGE, path], capture_output=True, text=True, check=True).stdout
    start, batch, memory = map(float, output.split())
    # Orders of magnitude, since the machine may be busy: what grew with the samples would take minutes.
    assert start < 1  # seconds of CPU, the slowest of five starts
    assert batch < 0.01  # seconds of CPU for the 4,096 places of a step
    assert memory < 1e6  # KB at most, with PyTorch and everything
