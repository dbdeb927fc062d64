"""The promises of data.subset: exact size, nested, the same samples in every epoch however a run is divided."""

import tracemalloc
from collections import Counter
from hashlib import blake2b
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvit_engine.config import load_config
from fastvit_engine.data import IterableData, prepare_data
from fastvit_engine.data.shards.index import open_index
from fastvit_engine.data.stream.batch_split import possible_splits
from fastvit_engine.data.stream.indexed import open_train_samples
from fastvit_engine.data.stream.order import SourceOrder, choose_lanes, subset_draws
from fastvit_engine.data.stream.subset import SubsetOrder, subset_indices
from fastvit_engine.errors import UserError
from fastvit_engine.observe.metrics import read_metrics
from fastvit_engine.train.step import hash_keys

_sizes = st.integers(2, 3000)


@settings(max_examples=80, deadline=None)
@given(_sizes, st.data(), st.integers(0, 2**64 - 1))
def test_a_subset_has_its_exact_size_and_is_part_of_every_larger_one(samples, data, seed):
    counts = st.integers(2, samples)
    shares = st.floats(1 / samples, 1)
    asked = data.draw(st.lists(st.one_of(counts, shares), min_size=2, max_size=6))
    found = [subset_indices(samples, one, seed) for one in asked]
    for one, subset in zip(asked, found, strict=True):
        assert len(subset) == (one if isinstance(one, int) else round(one * samples))
        assert subset.dtype == np.int64 and subset[0] >= 0 and subset[-1] < samples
        assert (np.diff(subset) > 0).all()
    found.sort(key=len)
    for smaller, larger in zip(found, found[1:], strict=False):
        assert np.isin(smaller, larger).all()


def test_the_same_samples_for_every_version():
    """A run must find its subset again with every later version of the engine and of NumPy."""
    subset = subset_indices(3_000_000, 0.013, 7)
    assert len(subset) == 39_000
    assert blake2b(subset.astype("<i8").tobytes(), digest_size=8).hexdigest() == "8e8a4c1e523de55d"
    plainly = np.concatenate(list(subset_draws(7, 3_000_000, 3_000_000)))  # in one piece
    assert np.array_equal(subset, np.sort(np.argsort(plainly, kind="stable")[:39_000]))
    assert not np.array_equal(subset, subset_indices(3_000_000, 0.013, 8))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_classes_keep_their_shares(share):
    labels = np.sort(np.arange(100_000) % 10)  # one class after the other
    labels[:5_000] = 10  # and one that is rarer
    counts = np.bincount(labels[subset_indices(len(labels), share, 3)], minlength=11)
    whole = np.bincount(labels)
    expected = whole * share
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected * (1 - share))).all()


def test_equal_draws_leave_the_size_exact_and_subsets_nested(monkeypatch):
    few = np.arange(50, dtype=np.uint64) % np.uint64(3)
    monkeypatch.setattr("fastvit_engine.data.stream.subset.subset_draws", lambda seed, samples, size: iter([few]))
    found = [subset_indices(50, size, 0) for size in range(2, 51)]
    assert [len(subset) for subset in found] == list(range(2, 51))
    assert all(np.isin(one, other).all() for one, other in zip(found, found[1:], strict=False))


def test_memory_is_that_of_the_subset():
    tracemalloc.start()
    subset = subset_indices(20_000_000, 0.01, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(subset) == 200_000 and peak < 60e6  # all draws would be 160 MB


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (1, "data.subset is 1: 1 can be read as all samples or as one: write 1.0 for all"),
        (0, "data.subset is 0: a number of samples is at least 2"),
        (-5, "a number of samples is at least 2"),
        (0.0, "a share is above 0 and at most 1.0"),
        (1.5, "a share is above 0 and at most 1.0"),
        (float("nan"), "a share is above 0"),
        (36, "data.subset is 36, and data.train has 35 samples: lower it"),
        (0.001, "data.subset is 0.001 of 35 samples, which is none: raise it"),
    ],
)
def test_what_is_no_subset_is_refused(wrong, says):
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        subset_indices(35, wrong, 0)


@pytest.mark.parametrize(
    ("text", "value"), [("0.1", 0.1), ("1.0", 1.0), ("5000", 5000), ("2", 2), ("null", None), ("1e-2", 0.01)]
)
def test_the_key_takes_shares_and_numbers(text, value):
    config = load_config("quickstart", [f"data.subset={text}"]).config
    assert config.data.subset == value and type(config.data.subset) is type(value)
    again = type(config).model_validate_json(config.model_dump_json())
    assert again.data.subset == value and type(again.data.subset) is type(value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["data.subset=1"], r"'data\.subset' \(--set\) is 1: 1 can be read as all samples or as one"),
        (["data.subset=true"], "write a number, not true or false"),
        (["data.subset=a tenth"], r"'data\.subset' \(--set\) is 'a tenth': write a share such as 0\.1, or a number"),
        (["data.subset=[0.1]"], r"'data\.subset' \(--set\) is \[0\.1\]: a share is above 0"),
        (["data.subset=1.2"], "a share is above 0 and at most 1.0"),
        (["data.subset=0.1", "data.order=stream"], "data.order = stream reads shards without knowing how many"),
        (["data.subset=500", "data.train_samples=499"], "data.subset is 500, and data.train has 499 samples"),
    ],
)
def test_the_key_refuses_what_can_be_read_two_ways(settings, says):
    with pytest.raises(UserError, match=says):
        load_config("quickstart", settings)


def test_an_epoch_of_the_configuration_is_the_subset():
    def epoch(*settings):
        return load_config("quickstart", settings).config.data.epoch_samples

    assert epoch("data.train_samples=50000") == 50_000
    assert epoch("data.train_samples=50000", "data.subset=0.1") == 5_000
    assert epoch("data.train_samples=50000", "data.subset=77") == 77
    assert epoch("data.subset=77") == 77
    assert epoch("data.subset=0.1") is None


# ---- the order


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(lambda counts: sum(counts) >= 60),
    st.integers(30, 60),
    st.integers(0, 2**63),
    st.sampled_from([1, 2, 3, 5, 8, 16, 30]),
    st.sampled_from([1, 2, 7, 64, 1000]),
)
def test_every_epoch_reads_each_sample_of_the_subset_once(counts, size, seed, lanes, window):
    chosen = subset_indices(sum(counts), size, seed)
    everything = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    order = SubsetOrder(chosen, np.asarray(counts), seed=seed, lanes=lanes, window=window)
    assert order.samples_per_epoch == size
    seen = []
    for epoch in range(3):
        shards, rows, epochs, positions = order.locate(np.arange(epoch * size, (epoch + 1) * size))
        seen.append(list(zip(shards.tolist(), rows.tolist(), strict=True)))
        assert sorted(seen[-1]) == [everything[number] for number in chosen]
        assert set(epochs.tolist()) == {epoch} and positions.tolist() == list(range(size))
        fresh = SubsetOrder(chosen, np.asarray(counts), seed=seed, lanes=lanes, window=window)
        for position in (0, size // 2, size - 1):  # a position is found without those before it
            shard, row, *_ = fresh.locate(np.array([epoch * size + position]))
            assert (shard[0], row[0]) == seen[-1][position]
    if min(window, size // lanes) >= 7:  # else there may be so few orders that one comes twice
        assert seen[0] != seen[1] != seen[2]


def test_batches_of_a_subset_come_from_everywhere_and_lanes_read_few_shards():
    counts = np.full(100, 1000)
    chosen = subset_indices(100_000, 0.26, 0)
    order = SubsetOrder(chosen, counts, seed=0, lanes=choose_lanes(len(chosen)), window=1024)
    batches = order.locate(np.arange(64 * 256))[0].reshape(64, 256)
    assert np.mean([len(np.unique(batch)) for batch in batches]) > 0.95 * 100 * (1 - np.exp(-2.56))
    assert len(np.unique(order.locate(np.arange(100) * order.lanes)[0])) <= 3


def test_the_whole_is_an_order_without_a_remainder():
    whole = SourceOrder(np.array([99]), seed=0, lanes=10, window=4, whole=True)
    assert whole.samples_per_epoch == 99
    longer = set()
    for epoch in range(6):
        rows = whole.locate(np.arange(epoch * 99, (epoch + 1) * 99))[1]
        assert sorted(rows.tolist()) == list(range(99))
        longer.add(tuple(whole._epoch(epoch).lengths.tolist()))
    assert len(longer) > 1


# ---- runs

BATCH = 6


def _keys(config, folder, world_size, steps, consumed=0, num_workers=0):
    """The keys of each global step, in the order of their positions."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": num_workers})})
    data = prepare_data(config, world_size=world_size, index_folder=folder)
    found = [[""] * BATCH for _ in range(steps)]
    split = next(possible_splits(config, world_size, 2))
    for rank in range(world_size):
        given = {"rank": rank, "world_size": world_size, "micro_batch_size": 2, "consumed": consumed}
        batches = data.train_batches(config, **given, pin_memory=False)
        for step in found:
            places = iter(split.positions(rank))
            for batch in islice(batches, len(split.micro_batches(rank))):
                for key in batch.keys:
                    step[next(places)] = key
    return found


def test_steps_are_the_same_for_every_world_size_worker_count_and_stop(shards, make_config, tmp_path):
    config = make_config(shards, batch=BATCH, subset=18, lanes=4, seed=5)
    chosen = sorted(f"s{number:03d}" for number in subset_indices(35, 18, 5))
    reference = _keys(config, tmp_path, 1, 9)
    for epoch in range(3):
        assert sorted(key for step in reference[3 * epoch : 3 * epoch + 3] for key in step) == chosen
    for world_size, workers, first in [(2, 0, 0), (2, 2, 0), (3, 0, 4), (1, 1, 7), (2, 1, 5)]:
        assert _keys(config, tmp_path, world_size, 2, first * BATCH, workers) == reference[first : first + 2]


def test_a_subset_of_several_sources_is_one_of_all_of_them(shards, make_config, tmp_path, write_tar, sample_members):
    other = tmp_path / "other"
    other.mkdir()
    write_tar(other / "a.tar", sample_members(range(100, 165)))
    sources = [{"shards": str(shards), "weight": 1}, {"shards": str(other), "weight": 3}]
    config = make_config(sources, batch=100, subset=0.4, seed=2)
    data = prepare_data(config, world_size=1, index_folder=tmp_path / "run")
    chosen = subset_indices(100, 0.4, 2)
    names = [f"s{number:03d}" for number in [*range(35), *range(100, 165)]]
    assert data.samples_per_epoch == 40 and sum(source.samples for source in data.train) == 40
    given = {"rank": 0, "world_size": 1, "micro_batch_size": 100, "consumed": 0}
    counts = Counter(key for b in islice(data.train_batches(config, **given, pin_memory=False), 10) for key in b.keys)
    assert set(counts) == {names[number] for number in chosen}
    assert sum(count for key, count in counts.items() if key >= "s100") == 750  # weights hold
    with pytest.raises(UserError, match=r"data\.subset = 2 has 2 samples, none of them of .*: raise it"):
        for seed in range(20):  # one of them has both samples in one source
            few = make_config(sources, subset=2, seed=seed)
            prepare_data(few, world_size=1, index_folder=tmp_path / "run")


def test_what_is_prepared_counts_the_subset(shards, make_config, tmp_path):
    def prepare(**data):
        return prepare_data(make_config(shards, **data), world_size=1, index_folder=tmp_path)

    plan = prepare(subset=0.5)
    assert plan.samples_per_epoch == 18 and plan.train[0].samples == 18
    assert "reading 18 samples of 35 (data.subset) in 1 lane" in plan.describe()
    assert plan.fingerprint(make_config(shards).data)["subset"] == 18
    assert "subset" not in prepare().fingerprint(make_config(shards).data)
    assert prepare(subset=0.5, train_samples=35).samples_per_epoch == 18
    with pytest.raises(UserError, match=r"data\.train_samples is 36, and data\.train has 35 samples, so data\.subset"):
        prepare(subset=0.5, train_samples=36)
    with pytest.raises(UserError, match=r"data\.lanes is 19 and .* has, in data\.subset, 18 samples: lower it"):
        prepare(subset=0.5, lanes=19)
    config = make_config("", subset=0.5)
    with pytest.raises(UserError, match="given as an iterable, whose samples nobody has numbered"):
        prepare_data(config, world_size=1, index_folder=tmp_path, given=IterableData([]))


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_on_a_tenth_has_the_ledger_of_exactly_those_samples(train, digits, tmp_path):
    """On one process, on two, and stopped and resumed: each step's hash is that of the samples it should have."""
    settings = ["data.subset=0.1", "seed=3", "train.duration=2 epochs", "train.precision=fp32"]
    settings += ["train.global_batch_size=16", "train.micro_batch_size=8", "schedule.warmup=1 step"]
    index = open_index(digits / "shards.index")
    train_shards = index.select([shard for shard in index.shards if "/train-" in shard])
    size = round(0.1 * train_shards.samples)

    def ledger(out):
        return [row["samples_hash"] for row in read_metrics(out / "metrics.jsonl")[0]]

    whole = ledger(train(tmp_path / "one", *settings))
    assert len(whole) == round(2 * size / 16)  # epochs count the subset
    assert ledger(train(tmp_path / "two", *settings, processes=2)) == whole
    for steps, processes in ((7, 1), (len(whole), 2)):
        length = f"train.duration={steps} steps"
        train(tmp_path / "resumed", *settings, length, processes=processes, resume="auto")
    assert ledger(tmp_path / "resumed") == whole

    config = load_config("quickstart", [f"data.train={digits}/train-*.tar", "data.eval=null", *settings]).config
    data = prepare_data(config, world_size=1, index_folder=tmp_path)
    samples = open_train_samples(config, data)
    every = samples.order.locate(np.arange(2 * size))
    names = [sample["__key__"] for sample in samples.read(every)]
    numbers = np.cumsum(train_shards.counts)[every.shard] - train_shards.counts[every.shard] + every.row
    chosen = subset_indices(train_shards.samples, 0.1, 3).tolist()
    assert sorted(numbers[:size].tolist()) == chosen == sorted(numbers[size:].tolist())
    steps = [f"{hash_keys(names[16 * step : 16 * step + 16]) % 2**64:016x}" for step in range(len(whole))]
    assert whole == steps
