"""What is refused before training starts, and where the index comes from."""

import json
import os
import shutil

import pytest

from fastvit_engine.data import prepare_data
from fastvit_engine.data.shards.index import open_index, write_index
from fastvit_engine.data.stream import prepare as prepare_module
from fastvit_engine.data.stream.indexed import IndexedShards
from fastvit_engine.errors import UserError


@pytest.fixture
def folder(shards, tmp_path):
    """A copy of the shards without an index."""
    copy = tmp_path / "shards"
    copy.mkdir()
    for shard in shards.glob("*.tar"):
        shutil.copy(shard, copy)
    return copy


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def _prepare(config, run, **options):
    return prepare_data(config, world_size=1, index_folder=run, **options)


def test_an_index_is_made_beside_the_shards_and_found_again(folder, run, make_config, monkeypatch):
    config = make_config(folder / "part-{0..3}.tar", eval=folder / "part-{4..6}.tar")
    plan = _prepare(config, run)
    assert plan.samples_per_epoch == 22 and plan.eval is not None
    index = open_index(folder / "shards.index")
    assert index.samples == 35 and sorted(folder.iterdir())[-1].name == "shards.index" and not run.exists()
    monkeypatch.setattr(prepare_module, "write_index", None)
    assert _prepare(config, run) == plan
    assert _prepare(make_config(folder), run).samples_per_epoch == 35


def test_a_changed_shard_is_indexed_again(folder, run, make_config, write_tar, sample_members):
    config = make_config(folder)
    before = _prepare(config, run)
    write_tar(folder / "part-1.tar", sample_members(range(100, 104)))
    os.remove(folder / "part-6.tar")
    after = _prepare(config, run)
    assert (before.samples_per_epoch, after.samples_per_epoch) == (35, 29)
    assert before.train[0].data.hash != after.train[0].data.hash
    with pytest.raises(UserError, match="was written anew while the run was starting"):
        IndexedShards(folder / "shards.index", after.train[0].data.shards, before.train[0].data.hash).open()


@pytest.mark.parametrize("why", ["no right to write", "another label"])
def test_without_a_place_beside_the_shards_the_run_folder_has_the_index(folder, run, make_config, monkeypatch, why):
    if why == "no right to write":
        monkeypatch.setattr(os, "access", lambda path, mode: path != folder)
    else:
        write_index([str(shard) for shard in folder.iterdir()], folder / "shards.index", label_key="txt")
    before = sorted(folder.iterdir())
    plan = _prepare(make_config(folder, eval=folder, allow_overlap=True), run)
    assert plan.train[0].data.index == run / "train.index" and plan.eval.index == run / "eval.index"
    assert sorted(folder.iterdir()) == before


def test_a_named_index_serves_the_same_shards_anywhere(shards, folder, tmp_path, run, make_config, write_tar):
    named = tmp_path / "all.index"
    index = write_index(sorted(map(str, shards.glob("*.tar"))), named)
    plans = [
        _prepare(make_config(train, index=str(named)), run) for train in (shards, folder, f"{folder}/part-*.tar")
    ] + [_prepare(make_config(named), run)]
    assert {plan.train[0].data.hash for plan in plans} == {index.hash}
    assert plans[1].train[0].data.shards[0] == str(folder / "part-0.tar")
    assert not (folder / "shards.index").exists()
    write_tar(shards.parent / "part-7.tar", [("x.jpg", b""), ("x.cls", b"0")])
    with pytest.raises(UserError, match=r"part-7\.tar is not in the index .*all\.index"):
        _prepare(make_config(f"{shards.parent}/part-7.tar", index=str(named)), run)
    with pytest.raises(UserError, match=r"there is no index .*gone\.index"):
        _prepare(make_config(folder, index=str(tmp_path / "gone.index")), run)
    with open(folder / "part-0.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match=r"part-0\.tar is not in the index"):
        _prepare(make_config(folder, index=str(named)), run)


def test_recorded_lanes_hold_unless_they_are_set(folder, run, make_config):
    config = make_config(folder)
    recorded = {"order": "indexed", "window": 1024, "sources": [{"index": "x", "lanes": 5, "weight": 1.0}]}
    assert _prepare(config, run).train[0].lanes == 1
    assert _prepare(config, run, recorded=recorded).train[0].lanes == 5
    assert _prepare(make_config(folder, lanes=7), run, recorded=recorded).train[0].lanes == 7


def test_streams_need_no_index(gzipped_shards, run, make_config):
    plan = _prepare(
        make_config(gzipped_shards, eval=gzipped_shards, allow_overlap=True, order="stream", streams=4), run
    )
    assert plan.plan.streams == 4 and plan.eval.shards and plan.samples_per_epoch is None
    assert "an order that holds for this number of streams only" in plan.describe()
    assert not (gzipped_shards / "shards.index").exists()


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (1, {"train": ""}, "data.train is not set"),
        (1, {"train": "nowhere/*.tar"}, "data.train is 'nowhere/\\*.tar', which matches no shards"),
        (1, {"eval": "nowhere/*.tar"}, "data.eval is .* matches no shards"),
        (1, {"train": "https://host/{0..1}.tar"}, r"names the shard https://host/0\.tar, which is not local: make an"),
        (1, {"lanes": 36}, "data.lanes is 36 and .* holds 35 samples"),
        (
            1,
            {"image_key": "tif"},
            r"sample 's000' of shard .*part-0\.tar has no 'tif' member, .* 7 others of data.train",
        ),
        (1, {"label_key": "txt"}, r"sample 's000' of shard .*part-0\.tar has no 'txt' member"),
        (1, {"order": "stream", "image_key": "tif"}, r"sample 's000' of shard .*part-0\.tar has no 'tif' member"),
        (3, {"order": "stream", "streams": 4}, "do not divide"),
        (8, {"order": "stream"}, "7 shards for 8"),
        (1, {"order": "stream", "streams": 5, "batch": 4}, "global_batch_size is 4"),
        (1, {"order": "stream", "train": [{"shards": "x"}]}, "reads one source"),
    ],
)
def test_refused_before_training(folder, run, make_config, world_size, changes, message):
    config = make_config(**({"train": folder} | changes))
    with pytest.raises(UserError, match=message) as error:
        prepare_data(config, world_size=world_size, index_folder=run)
    assert "\n" not in str(error.value)


def test_a_gzipped_shard_says_what_to_do(gzipped_shards, run, make_config):
    with pytest.raises(
        UserError, match=r"part-2\.tar\.gz is gzipped: make plain tar .* or train with data.order=stream"
    ):
        _prepare(make_config(gzipped_shards), run)


def test_a_source_with_too_little_weight(folder, run, make_config):
    train = [{"shards": str(folder / "part-0.tar"), "weight": 1e6}, {"shards": str(folder / "part-1.tar"), "weight": 1}]
    with pytest.raises(UserError, match=r"the weight 1 of .*part-1\.tar in data\.train is less than a 1000th"):
        _prepare(make_config(train), run)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("b.jpg", b"x"), ("b.cls", b"3")], r"sample 'b' of shard .*b\.tar has label 3, outside 0\.\.2"),
        ([("b.jpg", b"x")], r"sample 'b' of shard .*b\.tar has no 'cls' member"),
        ([("b.jpg", b"x"), ("b.cls", b"[1, 1]"), ("c.cls", b"9")], r"sample 'b' .*has 2 labels in 'cls'"),
    ],
)
def test_the_one_bad_label_among_many_is_found(folder, run, make_config, write_tar, sample_members, members, message):
    write_tar(folder / "b.tar", [*sample_members(range(100, 110)), *members])
    with pytest.raises(UserError, match=message):
        _prepare(make_config(folder), run)


def test_without_classes_any_labels_and_none_will_do(folder, run, make_config, write_tar, photo):
    write_tar(folder / "b.tar", [("b.jpg", photo(0)), ("c.jpg", photo(1)), ("c.cls", b"9"), ("d.jpg", photo(2))])
    config = make_config(folder, eval=folder, allow_overlap=True)
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_classes": 0})})
    prepared = _prepare(config, run)
    assert prepared.samples_per_epoch == 38
    (batch,) = prepared.eval_batches(config, rank=0, world_size=1, batch_size=38, pin_memory=False)
    assert {"b", "c", "d"} <= set(batch.keys) and batch.weights.all() and not batch.labels.any()


def test_images_of_which_none_decodes(tmp_path, run, make_config, write_tar):
    write_tar(tmp_path / "a.tar", [m for n in range(20) for m in ((f"{n}.jpg", b"<html>"), (f"{n}.cls", b"0"))])
    with pytest.raises(UserError, match=r"sample '0' of shard .*a\.tar has an image in 'jpg' that cannot be decoded"):
        _prepare(make_config(tmp_path), run)


@pytest.mark.parametrize("order", ["indexed", "stream"])
def test_zero_byte_shard(tmp_path, run, write_tar, sample_members, make_config, order):
    write_tar(tmp_path / "a.tar", sample_members(range(3)))
    (tmp_path / "b.tar").touch()
    with pytest.raises(UserError, match=r"b\.tar (of data\.train )?is an empty file"):
        _prepare(make_config(tmp_path, order=order), run)


@pytest.mark.parametrize("order", ["indexed", "stream"])
def test_dataset_json_gives_classes_and_samples(tmp_path, run, write_tar, sample_members, make_config, order):
    write_tar(tmp_path / "train-000000.tar", sample_members(range(3)))
    info = {
        "classes": ["a", "b", "c"],
        "source": "x",
        "seed": 0,
        "eval_fraction": 0.0,
        "samples_per_shard": 3,
        "train": {"samples": 3, "shards": {"train-000000.tar": 3}},
        "eval": {"samples": 0, "shards": {}},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    plan = _prepare(make_config(tmp_path, order=order), run)
    assert plan.class_names == ["a", "b", "c"] and plan.samples_per_epoch == 3
    assert _prepare(make_config(tmp_path, order=order, train_samples=77), run).samples_per_epoch == 77
    (tmp_path / "dataset.json").write_text(json.dumps(info | {"classes": ["a", "b", "c", "d"]}))
    with pytest.raises(UserError, match=r"4 classes but model\.num_classes is 3: set model\.num_classes to 4"):
        _prepare(make_config(tmp_path, order=order), run)
