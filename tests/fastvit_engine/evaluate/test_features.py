"""Features are what `represent` gives of the images that evaluation sees, in the order of the shards."""

import contextlib

import numpy as np
import pytest
import torch

from fastvit_engine import api
from fastvit_engine.config import Config, ModelConfig, Resolved, load_config
from fastvit_engine.data.stream.prepare import eval_streams, prepare_data
from fastvit_engine.data.stream.streams import StreamedShards
from fastvit_engine.errors import UserError
from fastvit_engine.evaluate.features import (
    Features,
    extract_features,
    load_both,
    load_features,
    save_arrays,
    save_both,
    save_features,
)
from fastvit_engine.evaluate.one_pass import OnePass, config_for, workers_for
from fastvit_engine.models import build_vit
from fastvit_engine.observe.progress import WorkProgress
from tests.fastvit_engine.ranks import on_ranks

SETTINGS = ["data.num_workers=0", "loss.kind=sigmoid"]


@pytest.fixture(scope="module", params=["linear", "mlp", "gap", "map"])
def model(request):
    changes = {"pool" if request.param in ("gap", "map") else "head": request.param}
    config = ModelConfig(name="Ti/4", image_size=16, num_classes=3, width=32, depth=1, heads=2, **changes)
    torch.manual_seed(1)
    return build_vit(config, mean=(0.5,) * 3, std=(0.5,) * 3)


def one_pass(model, shards, *settings, limit=None, workers=0):
    resolved = load_config(None, [*SETTINGS, f"data.num_workers={workers}", *settings])
    return OnePass.over(str(shards), "eval", config_for(model, resolved), named="--data", limit=limit)


def features_of(model, shards, *settings, batch_size=6, **given):
    progress = WorkProgress(quiet=True)
    batches = one_pass(model, shards, *settings, **given).batches(batch_size, doing="features of", progress=progress)
    return extract_features(model, batches)


def test_workers_are_no_more_than_cpus_unless_somebody_sets_them(monkeypatch, model, shards):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    given = Config.model_validate({"data": {"num_workers": 3}})
    assert (workers_for(Config()), workers_for(given)) == (2, 3)
    assert config_for(model, load_config(None)).data.num_workers == 2
    seen = []

    def eval_batches(self, config, **given):
        seen.append(config.data.num_workers)
        raise UserError("enough")

    monkeypatch.setattr(StreamedShards, "eval_batches", eval_batches)
    for config in (None, given):
        with pytest.raises(UserError, match="enough"):
            api.evaluate(model, str(shards), config=config)
    assert seen == [2, 3]


def test_features_are_the_representations_in_the_order_of_the_shards(model, shards):
    found = features_of(model.train(), shards)
    assert found.keys.tolist() == [f"s{n:03d}" for n in range(35)]
    assert found.labels.tolist() == [n % 3 for n in range(35)]
    assert (found.features.dtype, found.labels.dtype, found.features.shape) == (np.float32, np.int64, (35, 32))
    assert model.training
    (batch,) = one_pass(model, shards).batches(35, doing="", progress=WorkProgress(quiet=True))
    with torch.no_grad():
        expected = model.eval().represent(batch.images)
    np.testing.assert_allclose(found.features, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 64), (2, 5), (3, 4)])
def test_order_and_rows_depend_neither_on_workers_nor_on_batches(model, shards, workers, batch_size):
    expected, found = features_of(model, shards), features_of(model, shards, workers=workers, batch_size=batch_size)
    assert found.keys.tolist() == expected.keys.tolist() and found.labels.tolist() == expected.labels.tolist()
    np.testing.assert_allclose(found.features, expected.features, atol=1e-6)


@pytest.mark.parametrize("order", ["indexed", "stream"])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_images_and_each_gets_all_features(model, shards, make_config, tmp_path, order, size):
    """Ranks read contiguous parts of indexed shards, and every so many samples of others."""
    expected = features_of(model, shards)
    config = make_config(shards, eval=shards, order=order, allow_overlap=True, eval_crop=0.875)
    if order == "stream":
        data = eval_streams(config)
    else:
        data = prepare_data(config, world_size=size, index_folder=tmp_path).eval

    def of_rank(world):
        own = model if world.rank == 0 else build_vit(model.config, mean=(0.5,) * 3, std=(0.5,) * 3)
        own.load_state_dict(model.state_dict())
        batches = data.eval_batches(config, rank=world.rank, world_size=size, batch_size=4, pin_memory=False)
        return extract_features(own, list(batches), world)

    for found in on_ranks(size, of_rank):
        assert found.keys.tolist() == expected.keys.tolist() and found.labels.tolist() == expected.labels.tolist()
        np.testing.assert_allclose(found.features, expected.features, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [1, 7, 35, 100])
def test_a_limit_takes_the_first_samples(model, shards, limit, workers):
    expected, found = features_of(model, shards), features_of(model, shards, limit=limit, workers=workers)
    assert found.keys.tolist() == expected.keys.tolist()[:limit]
    np.testing.assert_allclose(found.features, expected.features[:limit], atol=1e-6)


def test_bad_samples_are_left_out_and_said(model, write_tar, photo, tmp_path, capsys):
    images = [photo(0), b"junk", photo(2), b"junk", photo(4)]
    members = [pair for n, image in enumerate(images) for pair in ((f"{n}.jpg", image), (f"{n}.cls", b"1"))]
    shard = write_tar(tmp_path / "a.tar", members)
    assert features_of(model, shard).keys.tolist() == ["0", "2", "4"]
    assert "left out: 2 of 5 samples; the first, sample '1' of" in capsys.readouterr().err
    assert features_of(model, shard, limit=3).keys.tolist() == ["0", "2"]
    assert "left out: 1 of 3 samples; the first, sample '1' of" in capsys.readouterr().err


def test_images_are_prepared_as_the_run_of_the_model_did_unless_settings_say_otherwise(model):
    model.eval_crop, model.eval_transform = 0.5, "fast"
    try:
        data = config_for(model, load_config(None)).data
        assert (data.eval_crop, data.eval_transform) == (0.5, "fast")
        data = config_for(model, load_config(None, ["data.eval_crop=0.9", "data.num_workers=9"])).data
        assert (data.eval_crop, data.eval_transform, data.num_workers) == (0.9, "fast", 9)
    finally:
        model.eval_crop = model.eval_transform = None
    data = config_for(model, Resolved(load_config(None).config)).data
    assert (data.eval_crop, data.eval_transform) == (0.875, "timm")


def test_several_labels_per_image_are_refused(model, write_tar, photo, tmp_path):
    shard = write_tar(tmp_path / "a.tar", [("0.jpg", photo(0)), ("0.cls", b"[1, 2]")])
    with pytest.raises(UserError, match="has 2 labels in 'cls'"):
        features_of(model, shard)
    with pytest.raises(UserError, match=r"one label per image: set data.max_labels=1"):
        features_of(model, shard, "data.max_labels=2")


FEATURES = Features(np.ones((2, 3), np.float32), np.array([0, 1]), np.array(["a", "ü/1"]))


def test_what_is_written_is_read_back(tmp_path):
    save_features(tmp_path / "f.npz", FEATURES)
    for before, after in zip(FEATURES, load_features(tmp_path / "f.npz"), strict=True):
        assert before.dtype == after.dtype and before.tolist() == after.tolist()
    save_both(tmp_path / "both.npz", FEATURES, FEATURES._replace(labels=np.array([5, 6])))
    assert [part.labels.tolist() for part in load_both(tmp_path / "both.npz")] == [[0, 1], [5, 6]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.npz", "f.npz"]
    with pytest.raises(UserError, match="cannot be written"):
        save_features(tmp_path / "gone" / "f.npz", FEATURES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.ones((3, 3), np.float32)}, r"holds no features and labels \(features float32 \[3, 3\]"),
        ({"features": np.ones(2, np.float32)}, "holds no features and labels"),
        ({"features": np.ones((2, 3), np.int64)}, "holds no features and labels"),
        ({"features": np.ones((2, 0), np.float32)}, "holds no features and labels"),
        ({"labels": np.array([0.0, 1.0])}, "holds no features and labels"),
        ({"labels": np.array([[0], [1]])}, "holds no features and labels"),
        ({"keys": np.array(["a"])}, "holds no features and labels"),
        ({"keys": np.array([{"a": 1}, 2], dtype=object)}, "allow_pickle=False"),
        ({"labels": None}, "has no array 'labels', only features, keys"),
        (
            {"features": None, **{f"block_{n}": np.zeros(1) for n in range(9)}},
            "has no array 'features', only block_0, block_1, block_2, block_3, block_4, ...: give a file",
        ),
    ],
)
def test_other_arrays_are_refused(tmp_path, changes, message):
    arrays = {name: array for name, array in (FEATURES._asdict() | changes).items() if array is not None}
    save_arrays(tmp_path / "f.npz", arrays)
    with pytest.raises(UserError, match=message):
        load_features(tmp_path / "f.npz")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "f.npz"
    save_features(path, FEATURES)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is not a whole file of features"):
            load_features(path)
    for _ in range(50):  # a flipped bit is found, or changes nothing that is read
        content = bytearray(whole)
        content[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            assert load_features(path).labels.tolist() == [0, 1]
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(UserError, match="holds one array"):
        load_features(tmp_path / "one.npy")
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match="is not a whole file of features"):
        load_features(path)
    with pytest.raises(UserError, match=r"gone\.npz does not exist"):
        load_features(tmp_path / "gone.npz")
