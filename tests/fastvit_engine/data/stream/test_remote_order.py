"""Shards on servers that fail: the steps of a run are those of the same shards on a disk."""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from fastvit_engine import storage
from fastvit_engine.data import prepare_data
from fastvit_engine.data.shards.index import write_index
from fastvit_engine.data.stream.read_ahead import ReadAhead
from fastvit_engine.errors import UserError
from fastvit_engine.storage import remote
from tests.fastvit_engine.storage.fault_server import FaultServer

BATCH, STEPS = 6, 9  # more than an epoch of 40 samples
NAMES = [f"{number}.tar" for number in range(4)]
FAULTS = [("drop", 3000), ("short", 700), ("status", 503), ("no range",), ("status", 429), ("chunked",), ("hang up",)]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF_S", 0.001)


@pytest.fixture
def folder(tmp_path, write_tar, sample_members) -> Path:
    (tmp_path / "shards").mkdir()
    for number, name in enumerate(NAMES):
        write_tar(tmp_path / "shards" / name, sample_members(range(10 * number, 10 * number + 10)))
    write_index([str(tmp_path / "shards" / name) for name in NAMES], tmp_path / "shards" / "shards.index")
    return tmp_path / "shards"


@pytest.fixture
def server(folder) -> Iterator[FaultServer]:
    with FaultServer({f"/{name}": (folder / name).read_bytes() for name in NAMES}).running() as server:
        yield server


def ledger(config, tmp_path, *, num_workers: int = 0) -> list[tuple]:
    """(keys, labels, weights, pixels) of each step, and of evaluation."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": num_workers})})
    plan = prepare_data(config, world_size=1, index_folder=tmp_path)
    options = {"rank": 0, "world_size": 1, "pin_memory": False}
    train = plan.train_batches(config, **options, micro_batch_size=BATCH, consumed=0, node_ranks=[0])
    batches = [*islice(train, STEPS), *plan.eval_batches(config, **options, batch_size=BATCH)]
    return [(b.keys, b.labels.tolist(), b.weights.tolist(), b.images.numpy().tobytes()) for b in batches]


def remote_config(make_config, server: FaultServer, folder: Path, **data):
    """The index of local shards serves the same shards elsewhere."""
    pattern = server.url("/{0..3}.tar")
    data = {"index": str(folder / "shards.index"), "allow_overlap": True} | data
    return make_config(pattern, eval=pattern, batch=BATCH, **data)


def local_config(make_config, folder: Path):
    return make_config(folder, eval=str(folder / "*.tar"), batch=BATCH, allow_overlap=True)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_a_server_that_fails_gives_the_order_of_the_disk(
    server, folder, make_config, tmp_path, monkeypatch, num_workers, cached
):
    expected = ledger(local_config(make_config, folder), tmp_path)
    script = random.Random(num_workers)
    server.faults = {f"/{name}": [script.choice([*FAULTS, None]) for _ in range(60)] for name in NAMES}
    cache = {"cache": str(tmp_path / "cache"), "cache_gb": 1e-3} if cached else {}
    config = remote_config(make_config, server, folder, **cache)
    assert ledger(config, tmp_path, num_workers=num_workers) == expected
    assert sum(len(faults) for faults in server.faults.values()) < 4 * 60  # they happened
    assert cached == bool(list((tmp_path / "cache").glob("*.shard")))


def test_a_server_that_stalls_gives_the_order_of_the_disk(server, folder, make_config, tmp_path, monkeypatch):
    expected = ledger(local_config(make_config, folder), tmp_path)
    whole = storage.ShardStorage.__init__
    monkeypatch.setattr(storage.ShardStorage, "__init__", lambda *args, **kw: whole(*args, **kw, timeout=0.3))
    server.faults = {f"/{name}": [None, ("stall", 900)] for name in NAMES}
    assert ledger(remote_config(make_config, server, folder), tmp_path) == expected
    assert not any(server.faults.values())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_object_store_gives_the_order_of_the_disk(s3_bucket, folder, make_config, tmp_path, num_workers):
    expected = ledger(local_config(make_config, folder), tmp_path)
    for name in NAMES:
        s3_bucket.pipe_file(f"bucket/order/{name}", (folder / name).read_bytes())
    write_index([f"s3://bucket/order/{name}" for name in NAMES], tmp_path / "s3.index")
    data = {"batch": BATCH, "index": str(tmp_path / "s3.index"), "allow_overlap": True}
    config = make_config("s3://bucket/order", eval="s3://bucket/order", **data)
    assert ledger(config, tmp_path, num_workers=num_workers) == expected


def test_a_web_server_with_a_whole_data_set(digits, make_config, tmp_path):
    files = {f"/set/{path.name}": path.read_bytes() for path in digits.iterdir()}
    with FaultServer(files).running() as server:
        train, held_out = (f"{server.url('/set/')}{p}" for p in ("train-{000000..000007}.tar", "eval-00000{0,1}.tar"))

        def prepared(train: str, held_out: str):
            config = make_config(train, eval=held_out, batch=BATCH)
            config = config.model_copy(update={"model": config.model.model_copy(update={"num_classes": 10})})
            return prepare_data(config, world_size=1, index_folder=tmp_path / "run")

        there, here = prepared(train, held_out), prepared(str(digits), str(digits))
        assert there.class_names == here.class_names == list("0123456789")
        assert there.train[0].data.hash == here.train[0].data.hash and there.eval.hash == here.eval.hash
        for name in ("dataset.json", "shards.index"):
            server.files[f"/set/{name}"] = b"<html>this is not the page that you are looking for"
        with pytest.raises(UserError, match="make an index of the shards with `fastvit data index"):
            prepared(train, held_out)


def test_a_shard_that_is_gone_for_good_is_one_error(server, folder, make_config, tmp_path):
    config = remote_config(make_config, server, folder, num_workers=2)
    plan = prepare_data(config, world_size=1, index_folder=tmp_path)
    del server.files["/2.tar"]
    train = plan.train_batches(config, rank=0, world_size=1, micro_batch_size=BATCH, consumed=0, pin_memory=False)
    with pytest.raises(UserError, match=r"^shard http://.*/2\.tar cannot be read \(HTTP 404.*restore it$"):
        list(islice(train, STEPS))


def test_shards_on_a_server_are_indexed_there(server, folder, tmp_path):
    server.faults = {f"/{name}": [("status", 503), ("drop", 600)] for name in NAMES}
    urls = [server.url(f"/{name}") for name in NAMES]
    there = write_index(urls, tmp_path / "there.index")
    here = write_index([str(folder / name) for name in NAMES], tmp_path / "here.index")
    assert there.hash == here.hash and there.counts.tolist() == here.counts.tolist()
    asked = len(server.requests)
    write_index(urls, tmp_path / "there.index")
    assert len(server.requests) == asked + len(urls)  # that nothing has changed
    del server.files["/1.tar"]
    with pytest.raises(UserError, match=r"shard http://.*/1\.tar cannot be read \(HTTP 404"):
        write_index(urls, tmp_path / "there.index")


def test_read_ahead_is_told_by_one_rank_of_a_node(server, folder, make_config, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(ReadAhead, "at", lambda self, start: told.append(start))
    config = remote_config(make_config, server, folder)
    plan = prepare_data(config, world_size=2, index_folder=tmp_path)
    options = {"world_size": 2, "pin_memory": False, "micro_batch_size": 3, "consumed": 0}
    next(plan.train_batches(config, rank=1, **options))
    assert not told
    next(plan.train_batches(config, rank=0, **options, node_ranks=[0, 1]))
    assert told
