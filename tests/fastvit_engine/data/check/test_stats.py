import json

import numpy as np
import pytest

import fastvit_engine.data.check.stats as stats_module
from fastvit_engine.config import Config
from fastvit_engine.data.build.make import make_dataset
from fastvit_engine.data.check.stats import QUANTILES, moments, shard_stats
from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.errors import UserError


@pytest.fixture(scope="module")
def varied(tmp_path_factory, photo, encode, write_tar):
    """Four shards of 30 images of many sizes, and the pixels of each image."""
    folder = tmp_path_factory.mktemp("varied")
    rng = np.random.default_rng(0)
    pixels = []
    for shard in range(4):
        members = []
        for row in range(30):
            image = rng.integers(0, 256, (*rng.integers(4, 60, 2), 3), dtype=np.uint8) // (1 + shard)
            pixels.append(image)
            key = f"{shard}-{row}"
            members += [(f"{key}.png", encode(image, "PNG")), (f"{key}.cls", str(row % 3 * 2).encode())]
        write_tar(folder / f"{shard}.tar", members)
    return folder, pixels


def test_figures_are_those_of_numpy(varied):
    folder, pixels = varied
    stats = shard_stats(str(folder), workers=2)
    values = np.concatenate([image.reshape(-1, 3) for image in pixels]).astype(np.float64) / 255
    assert stats.images == stats.pixel_images == 120
    np.testing.assert_allclose(stats.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.std, values.std(axis=0), rtol=1e-12)
    heights, widths = (np.array([image.shape[side] for image in pixels]) for side in (0, 1))
    assert np.array_equal(stats.height, heights) and np.array_equal(stats.width, widths)
    quantiles = stats.quantiles()
    np.testing.assert_allclose(quantiles["width / height"], np.quantile(widths / heights, QUANTILES))
    np.testing.assert_allclose(quantiles["short side"], np.quantile(np.minimum(widths, heights), QUANTILES))
    sizes = [len(s["png"]) for shard in range(4) for s in read_shard(str(folder / f"{shard}.tar"))]
    assert stats.bytes.tolist() == sizes and stats.formats == {"PNG": 120}
    assert stats.class_names == ["class 0", "class 2", "class 4"] and stats.class_counts.tolist() == [40, 40, 40]


def test_moments_do_not_cancel():
    histograms = np.zeros((3, 256), np.int64)
    histograms[:, 200] = 10**12
    histograms[0, 201] = 1
    mean, std = moments(histograms)
    np.testing.assert_allclose(mean, 200 / 255)
    assert std[1] == 0 and 0 < std[0] < 1e-8


def test_pixels_of_evenly_spaced_images_are_looked_at(varied, monkeypatch):
    folder, pixels = varied
    monkeypatch.setattr(stats_module, "PIXEL_SAMPLE", 16)
    stats = shard_stats(str(folder), workers=1)
    assert stats.images == 120 and stats.pixel_images == 4 * 8  # rows 0, 4, 8, ... 28
    chosen = [image for place, image in enumerate(pixels) if place % 30 % 4 == 0]
    values = np.concatenate([image.reshape(-1, 3) for image in chosen]) / 255
    np.testing.assert_allclose(stats.mean, values.mean(axis=0), rtol=1e-12)


def test_made_shards_have_class_names_and_splits(tmp_path, photo):
    for number in range(30):
        path = tmp_path / "in" / ("ant" if number % 3 else "bee") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number))
    make_dataset(str(tmp_path / "in"), tmp_path / "out", eval_fraction=0.2, workers=1, progress=lambda line: None)
    whole, held_out = shard_stats(str(tmp_path / "out")), shard_stats(str(tmp_path / "out"), split="eval")
    assert dict(zip(whole.class_names, whole.class_counts, strict=True)) == {"ant": 20, "bee": 10}
    assert held_out.images == 6 and held_out.shards == 1 and held_out.class_counts.tolist() == [4, 2]
    content = json.loads(whole.to_json())
    assert content["classes"] == {"ant": 20, "bee": 10} and content["quantiles"]["width"] == [40] * 7
    report = whole.report().splitlines()
    assert report[-2].split() == ["ant", "20", "█" * 32] and report[-1].split() == ["bee", "10", "█" * 16]


def test_report_of_many_classes_shows_the_ends(tmp_path, write_tar, photo):
    members = []
    for label in range(40):
        for n in range(label % 7 + 1):
            members += [(f"{label}-{n}.jpg", photo(1)), (f"{label}-{n}.cls", str(label).encode())]
    write_tar(tmp_path / "a.tar", members)
    report = shard_stats(str(tmp_path)).report()
    assert "... 24 classes between ..." in report and report.count("█" * 32) == 5 and len(report.splitlines()) < 35


def test_samples_with_several_labels_count_for_each(tmp_path, write_tar, photo):
    members = []
    for number, labels in enumerate(([0, 1], [1], [])):
        members += [(f"{number}.jpg", photo(number)), (f"{number}.json", json.dumps({"labels": labels}).encode())]
    write_tar(tmp_path / "a.tar", members)
    config = Config.model_validate({"data": {"label_key": "json.labels", "max_labels": 2}})
    stats = shard_stats(str(tmp_path), config)
    assert stats.class_counts.tolist() == [1, 2] and stats.images == 3 and stats.unusable == {"wrong label": 1}
    assert shard_stats(str(tmp_path)).unusable == {"missing member": 3}


def test_what_is_not_usable_is_counted_and_left_out(tmp_path, write_tar, photo):
    members = [
        ("a.jpg", photo(1)),
        ("a.cls", b"1"),
        ("b.jpg", b"x"),
        ("b.cls", b"1"),
        ("c.cls", b"2"),
        ("._c.jpg", b""),
    ]
    write_tar(tmp_path / "a.tar", [*members, ("d.jpg", photo(2)), ("d.cls", b"cat")])
    stats = shard_stats(str(tmp_path))
    assert stats.images == 2 and stats.unusable == {"unreadable image": 1, "missing member": 1, "wrong label": 1}
    assert dict(zip(stats.class_names, stats.class_counts, strict=True)) == {"class 1": 2, "class 2": 1}
    report = stats.report()
    assert "left out: 1 of kind 'unreadable image'" in report and "1 macOS resource files" in report
    content = json.loads(stats.to_json())
    assert content["unusable"]["wrong label"] == 1 and content["ignored"] == 1


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "hold no samples"),
        ([("a.cls", b"1")], "hold no usable image .1 of kind 'missing member'"),
        ([("a.jpg", b"x"), ("a.cls", b"1")], "hold no usable image .1 of kind 'unreadable image'"),
    ],
)
def test_shards_that_cannot_serve(tmp_path, write_tar, members, message):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message):
        shard_stats(str(tmp_path))
