import errno
import json
import os
from collections import Counter
from pathlib import Path

import pytest

import fastvit_engine.data.make as make_module
from fastvit_engine.data.make import make_dataset
from fastvit_engine.data.shards import find_shards
from fastvit_engine.data.stream import read_shard
from fastvit_engine.errors import UserError

CLASSES = {"ant": 20, "bee": 11, "cow": 5}


@pytest.fixture
def photos(tmp_path: Path, photo) -> Path:
    for label, (name, count) in enumerate(CLASSES.items()):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.jpg").write_bytes(photo(100 * label + number))
    return tmp_path / "photos"


def _make(source: Path | str, out: Path, **changes):
    arguments = {"eval_fraction": 0.2, "samples_per_shard": 10, "seed": 0, "progress": lambda line: None} | changes
    return make_dataset(str(source), out, **arguments)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _samples(folder: Path, split: str) -> list[tuple[str, bytes, str]]:
    return [
        (sample["__key__"], sample["jpg"], sample["cls"].decode())
        for shard in find_shards(str(folder), split)
        for sample in read_shard(shard)
    ]


def test_splits_are_stratified_disjoint_and_whole(photos, tmp_path, photo):
    made = _make(photos, tmp_path / "out")
    train, held_out = (_samples(tmp_path / "out", split) for split in ("train", "eval"))
    assert len(train) == made.info.train.samples and len(held_out) == made.info.eval.samples == 7
    everything = train + held_out
    assert len({key for key, _, _ in everything}) == 36
    images = {photo(100 * label + n): str(label) for label, count in enumerate(CLASSES.values()) for n in range(count)}
    assert {image: label for _, image, label in everything} == images
    per_class = Counter(label for _, _, label in held_out)
    for label, count in enumerate(CLASSES.values()):
        assert abs(per_class[str(label)] - 0.2 * count) <= 1


def test_samples_are_shuffled_over_classes(photos, tmp_path):
    _make(photos, tmp_path / "out")
    labels = [label for _, _, label in _samples(tmp_path / "out", "train")]
    assert labels != sorted(labels) and len(set(labels[:10])) > 1


def test_shards_are_balanced_and_described(photos, tmp_path):
    _make(photos, tmp_path / "out", samples_per_shard=8)
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert info["classes"] == list(CLASSES) and info["seed"] == 0
    assert info["train"]["samples"] == 29 and len(info["train"]["shards"]) == 4  # ceil(29 / 8)
    sizes = info["train"]["shards"].values()
    assert sum(sizes) == 29 and max(sizes) - min(sizes) <= 1
    for name, size in (info["train"]["shards"] | info["eval"]["shards"]).items():
        assert len(list(read_shard(str(tmp_path / "out" / name)))) == size
    assert set(_contents(tmp_path / "out")) == {"dataset.json", *info["train"]["shards"], *info["eval"]["shards"]}


def test_output_is_reproducible_to_the_byte(photos, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _make(photos, tmp_path / name, seed=seed)
    a, b, c = (_contents(tmp_path / name) for name in "abc")
    assert a == b and a["train-000000.tar"] != c["train-000000.tar"]


def test_no_eval_split(photos, tmp_path):
    made = _make(photos, tmp_path / "out", eval_fraction=0.0)
    assert made.info.train.samples == 36 and made.info.eval.shards == {}


def test_second_run_does_nothing(photos, tmp_path):
    first = _make(photos, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    lines: list[str] = []
    again = _make(photos, tmp_path / "out", progress=lines.append)
    assert again.already_made and not first.already_made and again.info == first.info
    assert len(lines) == 1 and "already made" in lines[0]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("changes", [{"seed": 1}, {"eval_fraction": 0.3}, {"samples_per_shard": 9}])
def test_other_arguments_are_refused(photos, tmp_path, changes):
    _make(photos, tmp_path / "out")
    with pytest.raises(UserError, match=f"was made with {next(iter(changes))}"):
        _make(photos, tmp_path / "out", **changes)


def test_killed_run_is_cleared_and_made_again(photos, tmp_path):
    _make(photos, tmp_path / "whole")
    out = tmp_path / "out"
    out.mkdir()
    for name in (make_module.MARKER_NAME, "train-000000.tar", "train-000099.tar", "train-000001.tar.tmp"):
        (out / name).write_bytes(b"left")
    _make(photos, out)
    assert _contents(out) == _contents(tmp_path / "whole")


def test_folder_of_someone_else_is_left_alone(photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="is not empty"):
        _make(photos, out)
    assert _contents(out) == {"train-000000.tar": b"precious"}


@pytest.mark.parametrize("existed", [False, True])
def test_corrupt_image_leaves_nothing_behind(photos, tmp_path, existed):
    (photos / "bee" / "5.jpg").write_bytes(b"\xff\xd8 no image")
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    with pytest.raises(UserError, match=r"bee/5\.jpg is not an image"):
        _make(photos, out, samples_per_shard=3)
    assert (list(out.iterdir()) == []) if existed else not out.exists()


def test_disk_full_leaves_nothing_behind(photos, tmp_path, monkeypatch):
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(make_module.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write to .*out \(No space left on device\)"):
        _make(photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_destination_that_cannot_be_written(photos, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file/out \(Not a directory\)"):
        _make(photos, tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_destination(photos, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="Permission denied"):
        _make(photos, tmp_path / "locked" / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_fraction": 1.0}, "--eval-fraction is 1.0"),
        ({"eval_fraction": -0.1}, "--eval-fraction"),
        ({"samples_per_shard": 0}, "--samples-per-shard is 0"),
        ({"eval_fraction": 0.001}, "36 images are too few"),
    ],
)
def test_bad_arguments(photos, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        _make(photos, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_progress_lines_tell_rate_and_time_left(photos, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 2))  # two seconds an image
    monkeypatch.setattr(make_module.time, "monotonic", lambda: float(next(clock)))
    lines: list[str] = []
    _make(photos, tmp_path / "out", progress=lines.append)
    assert lines[0] == "3 of 36 images, 0 images/s, 1.1 minutes left" and len(lines) == 13
