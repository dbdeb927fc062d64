import json

import pytest

from fastvit_engine.data import check_data
from fastvit_engine.errors import UserError


def test_good_data_passes(shards, make_config):
    check_data(make_config(shards, eval=shards, streams=4), world_size=2)


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (1, {"train": ""}, "data.train is not set"),
        (1, {"train": "nowhere/*.tar"}, "matches no shards"),
        (1, {"eval": "nowhere/*.tar"}, "data.eval is .* matches no shards"),
        (3, {"streams": 4}, "do not divide"),
        (8, {}, "7 shards for 8"),
        (1, {"streams": 3}, "global_batch_size is 8"),
        (1, {"image_key": "tif"}, r"sample 's000' of shard .*part-0\.tar has no 'tif' member"),
        (1, {"label_key": "txt"}, "has no 'txt' member"),
    ],
)
def test_refused_before_training(shards, make_config, world_size, changes, message):
    with pytest.raises(UserError, match=message):
        check_data(make_config(**({"train": shards} | changes)), world_size=world_size)


def test_zero_byte_shard(tmp_path, write_tar, sample_members, make_config):
    write_tar(tmp_path / "a.tar", sample_members(range(3)))
    (tmp_path / "b.tar").touch()
    with pytest.raises(UserError, match=r"b\.tar of data\.train is an empty file"):
        check_data(make_config(tmp_path), world_size=1)


def test_more_classes_than_the_model_has(tmp_path, write_tar, sample_members, make_config):
    write_tar(tmp_path / "train-000000.tar", sample_members(range(3)))
    info = {
        "classes": ["a", "b", "c", "d"],
        "source": "x",
        "seed": 0,
        "eval_fraction": 0.0,
        "samples_per_shard": 3,
        "train": {"samples": 3, "shards": {"train-000000.tar": 3}},
        "eval": {"samples": 0, "shards": {}},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"4 classes but model\.num_classes is 3: set model\.num_classes to 4"):
        check_data(make_config(tmp_path), world_size=1)
