"""A run that would evaluate on what it trains on is refused, whatever the shards are called."""

import os
import re
import shutil
from pathlib import Path

import pytest

from fastvit_engine.data import prepare_data
from fastvit_engine.data.shards.index import write_index
from fastvit_engine.data.stream.overlap import check_streams_apart
from fastvit_engine.errors import UserError

ADVICE = re.escape(
    ": set them to different shards, or set data.allow_overlap to true if you mean to evaluate on training images"
)


@pytest.fixture
def folder(tmp_path, write_tar, sample_members) -> Path:
    (tmp_path / "set").mkdir()
    for number in range(4):
        write_tar(tmp_path / "set" / f"{number}.tar", sample_members(range(10 * number, 10 * number + 10)))
    return tmp_path / "set"


def _copies(folder: Path, kind: str) -> str:
    """Another way to name the third shard."""
    shard, other = folder / "3.tar", folder.parent / "other.tar"
    if kind == "path":
        return f"{folder}/../set//3.tar"
    if kind == "URL":
        return f"file://{shard}"
    if kind == "folder":
        return str(folder)
    if kind == "copy":
        shutil.copyfile(shard, other)
    elif kind == "link":
        os.link(shard, other)
    else:
        other.symlink_to(shard)
    return str(other)


@pytest.mark.parametrize("order", ["indexed", "stream"])
@pytest.mark.parametrize("kind", ["path", "URL", "folder", "copy", "link", "symbolic link"])
def test_the_same_shard_under_another_name(folder, tmp_path, make_config, order, kind):
    data = {"eval": _copies(folder, kind), "order": order}
    with pytest.raises(UserError, match=f"data.train and data.eval both hold the .*[03]\\.tar.*{ADVICE}$") as error:
        prepare_data(make_config(folder, **data), world_size=1, index_folder=tmp_path / "run")
    assert "\n" not in str(error.value)
    allowed = prepare_data(make_config(folder, allow_overlap=True, **data), world_size=1, index_folder=tmp_path / "run")
    assert allowed.eval is not None
    apart = make_config(folder / "[0-2].tar", **{**data, "eval": str(folder / "3.tar")})
    assert prepare_data(apart, world_size=1, index_folder=tmp_path / "run").eval is not None


def test_one_of_several_sources(folder, tmp_path, make_config):
    sources = [{"shards": f"{folder}/{number}.tar"} for number in (0, 1)]
    config = make_config(sources, eval=folder / "1.tar")
    with pytest.raises(UserError, match=rf"both hold the shard {folder}/1\.tar"):
        prepare_data(config, world_size=1, index_folder=tmp_path)


def test_an_index_for_both(folder, tmp_path, make_config):
    write_index([str(folder / "0.tar"), str(folder / "1.tar")], tmp_path / "all.index")
    config = make_config(tmp_path / "all.index", eval=tmp_path / "all.index")
    with pytest.raises(UserError, match=rf"both hold the shard {folder}/0\.tar"):
        prepare_data(config, world_size=1, index_folder=tmp_path)


def test_an_index_of_both_splits_gives_each_its_own(tmp_path, make_config, write_tar, sample_members):
    names = ["a-train-0.tar", "a-train-1.tar", "a-val-0.tar"]
    for number, name in enumerate(names):
        write_tar(tmp_path / name, sample_members(range(10 * number, 10 * number + 10)))
    write_index([str(tmp_path / name) for name in names], tmp_path / "all.index")
    config = make_config(tmp_path / "all.index", eval=tmp_path / "all.index")
    data = prepare_data(config, world_size=1, index_folder=tmp_path)
    assert [Path(shard).name for shard in data.train[0].data.shards] == names[:2]
    assert [Path(shard).name for shard in data.eval.shards] == names[2:]
    assert "data.train: the 2 of" in data.describe() and "data.eval: the 1 of" in data.describe()
    everything = prepare_data(make_config(f"{tmp_path}/*.tar"), world_size=1, index_folder=tmp_path)
    assert everything.describe().endswith("; data.train matches 2 named train and 1 named val")


def test_shards_that_differ_in_their_images_alone_are_apart(tmp_path, make_config, write_tar, photo, encode):
    """As MNIST's: images of one size, of the same class, under the same keys."""
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        members = []
        for number in range(20):
            image = photo(number + (100 if name == "val" else 0)).ljust(2048, b"\0")
            members += [(f"{number:04d}.jpg", image), (f"{number:04d}.cls", b"0")]
        write_tar(tmp_path / name / "0.tar", members)
    config = make_config(tmp_path / "train", eval=tmp_path / "val")
    assert prepare_data(config, world_size=1, index_folder=tmp_path).eval is not None


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("https://host/a/../b/1.tar", "https://HOST:443/b//1.tar?signature=x"),
        ("https://user:secret@host/1.tar", "https://host/1.tar"),
        ("gs://bucket/%61/1.tar", "gcs://bucket/a/1.tar"),
        ("pipe:cat  a.tar", "pipe:cat a.tar"),
    ],
)
def test_the_same_url(train, held_out, make_config):
    data = make_config("x", order="stream").data
    with pytest.raises(UserError, match="data.train and data.eval both hold") as error:
        check_streams_apart([train], [held_out], data)
    assert "secret" not in str(error.value) and "signature" not in str(error.value)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("https://host/1.tar", "https://other/1.tar"),
        ("https://host/get?file=1.tar", "https://host/get?file=2.tar"),
        ("s3://Bucket/1.tar", "s3://bucket/1.tar"),
    ],
)
def test_other_urls_are_apart(train, held_out, make_config):
    check_streams_apart([train], [held_out], make_config("x", order="stream").data)


def test_a_data_set_copied_into_a_bucket_trains_and_evaluates_as_on_the_disk(digits, tmp_path, make_config, s3_bucket):
    for path in digits.iterdir():
        s3_bucket.pipe_file(f"bucket/overlap/digits/{path.name}", path.read_bytes())
    url = "s3://bucket/overlap/digits"

    def prepared(where: str, **data):
        config = make_config(where, eval=where, **data)
        config = config.model_copy(update={"model": config.model.model_copy(update={"num_classes": 10})})
        return prepare_data(config, world_size=1, index_folder=tmp_path / "run")

    here, there = prepared(str(digits)), prepared(url)
    assert there.train[0].data.hash == here.train[0].data.hash and there.eval.hash == here.eval.hash
    assert there.samples_per_epoch == here.samples_per_epoch and there.class_names == here.class_names
    assert {shard.rpartition("/")[2][:5] for shard in there.train[0].data.shards} == {"train"}
    with pytest.raises(UserError, match=rf"both hold the shard {url}/eval-000000\.tar"):
        prepared(f"{url}/*.tar")
    streamed = prepared(url, order="stream", batch=8)
    assert streamed.train == there.train[0].data.shards and streamed.eval.shards == there.eval.shards
    assert streamed.samples_per_epoch == here.samples_per_epoch and streamed.class_names == here.class_names
