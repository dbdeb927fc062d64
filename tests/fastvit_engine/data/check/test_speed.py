"""The stages and the loader of a user's own shards, on the clock."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit_engine.cli import main
from fastvit_engine.data import prepare_data
from fastvit_engine.data.check.speed import QUICK, ShardSpeed, StageTimes, link_shards, measure_speed, report, stages
from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.data.stream.batch import StageSeconds
from fastvit_engine.errors import UserError


@pytest.mark.parametrize("order", ["indexed", "stream"])
def test_stages_are_those_of_the_loader(shards, make_config, tmp_path, order):
    """What is timed stage by stage gives the images that training gets."""
    config = make_config(shards, batch=8, order=order)
    data = prepare_data(config, world_size=1, index_folder=tmp_path)
    timed = [(image.copy(), seconds) for image, seconds in stages(config, data, 16)]
    options = {"rank": 0, "world_size": 1, "micro_batch_size": 8, "consumed": 0, "pin_memory": False}
    batches = [batch.images.clone() for batch in islice(data.train_batches(config, **options), 2)]
    assert np.array_equal(np.stack([image for image, _ in timed]), torch.cat(batches).numpy())
    assert all(min(clock) >= 0 and wall.decode > 0 for _, (cpu, wall) in timed for clock in (cpu, wall))


@pytest.mark.parametrize("settings", [[], ["--set", "data.order=stream"], ["--workers", "0"]])
def test_command(shards, capsys, settings):
    before = sorted(shards.iterdir())
    words = ["--set", "model.image_size=16", "--set", "train.micro_batch_size=8", "--set", "data.num_workers=1"]
    assert main(["data", "bench", str(shards), *words, *settings, "--quick", "--rounds", "1", "--json"]) == 0
    (speed,) = json.loads(capsys.readouterr().out)
    assert sorted(shards.iterdir()) == before
    counts = [0] if "--workers" in settings else [0, 1]
    expected = {"read, parse labels", "decode", "crop, resize, mirror", *(f"loader, {n} workers" for n in counts)}
    assert set(speed["images_per_second"]) == set(speed["images_per_cpu_second"]) == expected
    assert min(speed["images_per_second"].values()) > 0 and speed["batch_size"] == 8 and speed["image_size"] == 16


def test_smaller_copies_and_own_keys(tmp_path, write_tar, photo, make_config):
    members = [(f"{n}.{ext}", data) for n in range(9) for ext, data in (("photo.jpg", photo(n, 60, 80)), ("txt", b"1"))]
    write_tar(tmp_path / "a.tar", members)
    config = make_config("unset", image_key="photo.jpg", label_key="txt")
    seen = []
    real, small = measure_speed(
        str(tmp_path), config, workers=0, effort=QUICK._replace(rounds=1), repack=24, progress=seen.append
    )
    assert small.name.endswith("short side 24") and real.stages[0].images == small.stages[0].images == 64
    assert "making the images smaller: short side 24" in seen and [path.name for path in tmp_path.iterdir()] == [
        "a.tar"
    ]
    text = report([real, small])
    assert text.count("loader, 0 workers") == 2 and "The slowest stage is" in text


def test_the_slowest_stage_is_named():
    times = StageTimes(10, StageSeconds(1, 5, 2), StageSeconds(9, 5, 2))
    speed = ShardSpeed("x", 224, 64, [times], {})
    assert speed.slowest() == "read" and speed.stage_rate("decode", "cpu") == 2
    assert "data.cache" in report([speed])


def test_repacked_images_have_the_short_side(tmp_path, shards, make_config):
    from fastvit_engine.data.check.speed import repack_shards
    from fastvit_engine.data.shards.usable import SampleKeys

    link_shards(str(shards), tmp_path / "links")
    repack_shards(tmp_path / "links", tmp_path / "small", 12, SampleKeys.of(make_config(shards).data))
    samples = [s for shard in sorted((tmp_path / "small").iterdir()) for s in read_shard(str(shard))]
    assert [sample["__key__"] for sample in samples] == [f"s{n:03d}" for n in range(35)]
    (tmp_path / "x.jpg").write_bytes(samples[0]["jpg"])
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.size == (16, 12)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "-1"], "--workers is -1"),
        (["--repack", "0"], "--repack is 0"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--set", "data.image_key=tif"], "set data.image_key"),
    ],
)
def test_what_cannot_be_measured(shards, capsys, words, message):
    assert main(["data", "bench", str(shards), "--quick", *words]) == 2
    assert message in capsys.readouterr().err


def test_repacking_needs_local_shards(make_config):
    with pytest.raises(UserError, match="--repack needs local shards"):
        measure_speed("memory://bench/{0..3}.tar", make_config(""), repack=24)
