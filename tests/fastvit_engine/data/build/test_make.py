import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastvit_engine.data.build.make as make_module
from fastvit_engine.config import load_config
from fastvit_engine.data import prepare_data
from fastvit_engine.data.build.encode import encode_for_shard
from fastvit_engine.data.build.failures import share_that_allows
from fastvit_engine.data.build.make import make_dataset
from fastvit_engine.data.build.output import LocalOutput
from fastvit_engine.data.pixels.decode import decode_image
from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.data.shards.index import INDEX_NAME, open_index
from fastvit_engine.data.shards.names import UNFINISHED_NAME, find_shards
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
    arguments = {"eval_fraction": 0.2, "samples_per_shard": 10, "workers": 2, "progress": lambda line: None} | changes
    return make_dataset(str(source), out, **arguments)


def _is_already_made(source: Path | str, out: Path, **changes) -> bool:
    lines: list[str] = []
    _make(source, out, progress=lines.append, **changes)
    return len(lines) == 1 and "is already made" in lines[0]


def _contents(folder: Path) -> dict[str, bytes]:
    """Files and their bytes; of the index, which also holds the time stamps of the shards, its hash."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    if INDEX_NAME in contents:
        contents[INDEX_NAME] = open_index(folder / INDEX_NAME).hash.encode()
    return contents


def _samples(folder: Path, split: str) -> list[dict]:
    return [sample for shard in find_shards(str(folder), split) for sample in read_shard(shard)]


def _triples(folder: Path, split: str) -> list[tuple[str, bytes, str]]:
    return [(sample["__key__"], sample["jpg"], sample["cls"].decode()) for sample in _samples(folder, split)]


def test_splits_are_stratified_disjoint_and_whole(photos, tmp_path, photo):
    made = _make(photos, tmp_path / "out")
    train, held_out = (_triples(tmp_path / "out", split) for split in ("train", "eval"))
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
    labels = [label for _, _, label in _triples(tmp_path / "out", "train")]
    assert labels != sorted(labels) and len(set(labels[:10])) > 1


def test_shards_are_balanced_and_described(photos, tmp_path):
    _make(photos, tmp_path / "out", samples_per_shard=8)
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert info["classes"] == list(CLASSES) and info["seed"] == 0 and info["options"]["resize"] is None
    assert info["train"]["samples"] == 29 and len(info["train"]["shards"]) == 4  # ceil(29 / 8)
    sizes = info["train"]["shards"].values()
    assert sum(sizes) == 29 and max(sizes) - min(sizes) <= 1
    for name, size in (info["train"]["shards"] | info["eval"]["shards"]).items():
        assert len(list(read_shard(str(tmp_path / "out" / name)))) == size
    assert set(_contents(tmp_path / "out")) == {
        INDEX_NAME,
        "dataset.json",
        *info["train"]["shards"],
        *info["eval"]["shards"],
    }


def test_output_is_reproducible_to_the_byte_with_any_number_of_workers(photos, tmp_path):
    for name, seed, workers in (("a", 0, 1), ("b", 0, 3), ("c", 1, 1)):
        _make(photos, tmp_path / name, seed=seed, workers=workers)
    a, b, c = (_contents(tmp_path / name) for name in "abc")
    assert a == b and a["train-000000.tar"] != c["train-000000.tar"]


def test_eval_fraction_of_nothing_and_by_default(photos, tmp_path):
    made = _make(photos, tmp_path / "none", eval_fraction=0.0)
    assert made.info.train.samples == 36 and made.info.eval.shards == {}
    made = _make(photos, tmp_path / "default", eval_fraction=None)
    assert made.info.eval.samples == 4 and made.info.eval_fraction == 0.1


def test_second_run_does_nothing(photos, tmp_path):
    first = _make(photos, tmp_path / "out", eval_fraction=None)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    lines: list[str] = []
    again = _make(photos, tmp_path / "out", eval_fraction=None, progress=lines.append)
    assert again.info == first.info
    assert len(lines) == 1 and "already made" in lines[0]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("lost", [["train-000000.tar"], ["eval-000000.tar", "train-000000.tar"]])
def test_a_second_run_does_not_call_made_what_has_lost_a_shard(photos, tmp_path, lost):
    _make(photos, tmp_path / "out", eval_fraction=None)
    for name in lost:
        (tmp_path / "out" / name).unlink()
    more = " and 1 more" if len(lost) > 1 else ""
    with pytest.raises(UserError, match=rf"{lost[0]}{more}, which its dataset.json lists, does not exist: copy it"):
        _make(photos, tmp_path / "out", eval_fraction=None)


def test_dataset_json_without_options_is_understood(photos, tmp_path):
    _make(photos, tmp_path / "out")
    path = tmp_path / "out" / "dataset.json"
    old = {
        key: value
        for key, value in json.loads(path.read_text()).items()
        if key not in ("options", "failed", "left_out")
    }
    path.write_text(json.dumps(old))
    assert _is_already_made(photos, tmp_path / "out")


CHANGES = [{"seed": 1}, {"eval_fraction": 0.3}, {"samples_per_shard": 9}, {"resize": 20}, {"dedup": True}]


@pytest.mark.parametrize("changes", CHANGES)
def test_other_arguments_are_refused(photos, tmp_path, changes):
    _make(photos, tmp_path / "out")
    option = "--" + next(iter(changes)).replace("_", "-")
    with pytest.raises(UserError, match=rf"was made with(out)? {option}( \S+)?, not with {option}"):
        _make(photos, tmp_path / "out", **changes)


def test_an_option_that_was_left_out_is_called_missing(photos, tmp_path):
    _make(photos, tmp_path / "out", eval_fraction=0.2)
    with pytest.raises(UserError, match=r"was made with --eval-fraction 0.2, not without --eval-fraction: "):
        _make(photos, tmp_path / "out", eval_fraction=None)


def test_other_arguments_are_refused_for_an_unfinished_run(photos, tmp_path):
    _make(photos, tmp_path / "out", plan_only=True)
    with pytest.raises(UserError, match="is being made with --seed 0, not with --seed 1"):
        _make(photos, tmp_path / "out", seed=1)


# --- stopped runs


@pytest.fixture(scope="module")
def many(tmp_path_factory, photo) -> Path:
    """240 photos of 4 classes."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(240):
        path = folder / f"class{number % 4}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(photo(number))
    return folder


def _start(source: Path, out: Path, **changes) -> multiprocessing.Process:
    """A run in a process group of its own, as from a shell; slow enough to be met at work."""

    def slowly(*arguments):
        time.sleep(0.01)
        return encode_for_shard(*arguments)

    def run() -> None:
        os.setsid()
        make_module.encode_for_shard = slowly  # in this process only
        _make(source, out, samples_per_shard=6, **changes)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def _receipts(out: Path) -> list[Path]:
    return sorted((out / UNFINISHED_NAME / "receipts").glob("*.json"))


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(many, tmp_path):
    _make(many, tmp_path / "whole", samples_per_shard=6)
    rng = random.Random(0)
    out = tmp_path / "out"
    for attempt in range(8):
        process = _start(many, out)
        wanted = len(_receipts(out)) + attempt % 4 if attempt else 0  # the first time before it packs
        while len(_receipts(out)) < wanted:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        if attempt % 2:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid, signal.SIGKILL)  # the workers find out by themselves
        process.join()
        assert not (out / "dataset.json").exists()
        for shard in list(out.glob("*.tar")):
            assert shard.read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()
    assert len(_receipts(out)) >= 8
    _make(many, out, samples_per_shard=6)
    assert _contents(out) == _contents(tmp_path / "whole")


def test_complete_shards_are_kept_and_others_made_again(many, tmp_path):
    out = tmp_path / "out"
    process = _start(many, out)
    while len(_receipts(out)) <= 5:
        assert process.is_alive()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    receipts = _receipts(out)
    receipts[-1].write_bytes(b"\0" * 40)  # as after a power failure
    kept, cut = (out / receipt.stem for receipt in receipts[:2])
    before = kept.stat().st_mtime_ns
    cut.write_bytes(cut.read_bytes()[:-1])  # a receipt does not make a shard complete
    lines: list[str] = []
    _make(many, out, samples_per_shard=6, progress=lines.append)
    assert f"{len(receipts) - 2} of 40 shards are complete" in lines[0]
    assert kept.stat().st_mtime_ns == before
    _make(many, tmp_path / "whole", samples_per_shard=6)
    assert _contents(out) == _contents(tmp_path / "whole")


def _stop_after_some_shards(source: Path, out: Path) -> None:
    _make(source, out, samples_per_shard=6, part=(1, 4))
    assert _receipts(out) and not (out / "dataset.json").exists()


def test_a_run_begun_by_an_earlier_version_goes_on_from_its_plan(many, tmp_path, photo):
    _make(many, tmp_path / "whole", samples_per_shard=6)
    out = tmp_path / "out"
    _stop_after_some_shards(many, out)
    plan = out / UNFINISHED_NAME / "plan"
    (out / UNFINISHED_NAME / "packing").rename(plan)
    (plan / "packing.json").rename(plan / "plan.json")
    with pytest.raises(UserError, match="is being made with --seed 0, not with --seed 1: remove the folder"):
        _make(many, out, samples_per_shard=6, seed=1)
    with pytest.raises(UserError, match="is being made from .*many.*, not from "):
        _make(tmp_path, out, samples_per_shard=6)
    _make(many, out, samples_per_shard=6, plan_only=True)
    assert not (out / UNFINISHED_NAME / "packing").exists()
    _make(many, out, samples_per_shard=6)
    assert _contents(out) == _contents(tmp_path / "whole")


def test_complete_shards_without_their_packing_are_refused(many, tmp_path):
    out = tmp_path / "out"
    _stop_after_some_shards(many, out)
    shutil.rmtree(out / UNFINISHED_NAME / "packing")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=rf"not what they were made from: remove the folder {out} or choose another --out"
    ):
        _make(many, out, samples_per_shard=6)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_images_added_while_it_was_stopped_do_not_change_the_packing(photos, tmp_path, photo):
    _make(photos, tmp_path / "whole")
    _make(photos, tmp_path / "out", plan_only=True)
    (photos / "ant" / "000.jpg").write_bytes(photo(999))
    _make(photos, tmp_path / "out")
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


def test_parts_make_the_shards_of_one_run(many, tmp_path):
    _make(many, tmp_path / "whole", samples_per_shard=7)
    out = tmp_path / "out"
    lines: list[str] = []
    for part in (3, 1, 4):
        made = _make(many, out, samples_per_shard=7, part=(part, 4), progress=lines.append)
        assert made.info is None and not (out / "dataset.json").exists()
    assert "part 4 of 4 is complete, 9 shards are left to other parts" in lines[-1]
    names = {path.name for path in out.glob("*.tar")}
    assert len(names) == 26 and names < set(_contents(tmp_path / "whole"))
    assert _make(many, out, samples_per_shard=7, part=(2, 4)).info is not None
    assert _contents(out) == _contents(tmp_path / "whole")
    assert _is_already_made(many, out, samples_per_shard=7, part=(1, 4))


def test_parts_at_the_same_time_and_one_run_over_what_a_part_left(many, tmp_path):
    _make(many, tmp_path / "whole", samples_per_shard=6)
    parts = [_start(many, tmp_path / "out", part=(part, 3), workers=1) for part in (1, 2, 3)]
    for part in parts:
        part.join()
    assert [part.exitcode for part in parts] == [0, 0, 0]
    assert _make(many, tmp_path / "out", samples_per_shard=6).info is not None  # finishes where none has seen all
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")
    _make(many, tmp_path / "rest", samples_per_shard=6, part=(2, 3))
    _make(many, tmp_path / "rest", samples_per_shard=6)
    assert _contents(tmp_path / "rest") == _contents(tmp_path / "whole")


def test_a_worker_that_is_killed_is_an_error_and_not_a_hang(photos, tmp_path, monkeypatch):
    def killed(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(make_module, "encode_for_shard", killed)
    with pytest.raises(UserError, match="a worker process was killed"):
        _make(photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what is refused


def test_folder_of_someone_else_is_left_alone(photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="is not empty"):
        _make(photos, out)
    assert _contents(out) == {"train-000000.tar": b"precious"}


@pytest.mark.parametrize("existed", [False, True])
def test_error_before_the_first_whole_shard_leaves_nothing_behind(photos, tmp_path, existed):
    (photos / "bee" / "5.jpg").write_bytes(b"\xff\xd8 no image")
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    with pytest.raises(UserError, match=r"bee/5\.jpg is not an image: repair it, or leave bad images out"):
        _make(photos, out, samples_per_shard=100, eval_fraction=0.0)
    assert (list(out.iterdir()) == []) if existed else not out.exists()


def test_shard_without_a_receipt_is_removed_with_the_rest(photos, tmp_path, monkeypatch):
    def stopped(*arguments) -> None:
        assert (tmp_path / "out" / "train-000000.tar").exists()
        raise UserError("stopped at the last moment")

    monkeypatch.setattr(LocalOutput, "write_receipt", stopped)
    with pytest.raises(UserError, match="stopped at the last moment"):
        _make(photos, tmp_path / "out", samples_per_shard=100, eval_fraction=0.0)
    assert not (tmp_path / "out").exists()


def test_a_packing_outlives_errors_of_later_runs(photos, tmp_path):
    _make(photos, tmp_path / "out", plan_only=True)
    packing = _contents(tmp_path / "out" / UNFINISHED_NAME / "packing")
    bad = photos / "bee" / "5.jpg"
    good = bad.read_bytes()
    bad.write_bytes(b"")
    for changes in ({"seed": 1}, {"samples_per_shard": 10}):
        with pytest.raises(UserError, match="is being made with --seed|is not an image"):
            _make(photos, tmp_path / "out", **changes)
        assert _contents(tmp_path / "out" / UNFINISHED_NAME / "packing") == packing
    bad.write_bytes(good)
    _make(photos, tmp_path / "out")
    _make(photos, tmp_path / "whole")
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


def test_bad_image_can_be_mended_and_the_run_goes_on(photos, tmp_path, photo):
    _make(photos, tmp_path / "whole", samples_per_shard=3, workers=1)
    later = next(iter(read_shard(str(tmp_path / "whole" / "train-000005.tar"))))["__key__"]
    bad = sorted(photos.rglob("*.jpg"))[int(later[:8])]
    good = bad.read_bytes()
    bad.write_bytes(good[:-200])
    with pytest.raises(UserError, match=rf"{bad} cannot be decoded \(.*truncated"):
        _make(photos, tmp_path / "out", samples_per_shard=3, workers=1)
    assert (tmp_path / "out" / "train-000004.tar").exists() and not list((tmp_path / "out").rglob("*.tmp"))
    bad.write_bytes(good)
    _make(photos, tmp_path / "out", samples_per_shard=3, workers=1)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


def test_the_share_that_is_proposed_is_enough(tmp_path, photo):
    folder = tmp_path / "photos"
    for number in range(21):
        path = folder / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number) if number != 8 else b"<html>")
    with pytest.raises(UserError, match=r"8\.jpg is not an image: .* with --max-failed (\S+), and run again") as error:
        _make(folder, tmp_path / "out")
    proposed = re.search(r"--max-failed (\S+),", str(error.value))[1]
    assert proposed == "0.05"
    assert _make(folder, tmp_path / "out", max_failed=float(proposed)).info.failed == 1


@pytest.mark.parametrize(
    ("failed", "images", "share"),
    [(1, 1000, "0.001"), (1, 21, "0.05"), (2, 21, "0.1"), (7, 100, "0.07"), (20, 21, None), (3, 3, None)],
)
def test_shares_are_proposed_with_one_digit(failed, images, share):
    assert share_that_allows(failed, images) == share


def test_failures_are_left_out_and_listed_up_to_a_share(photos, tmp_path):
    (photos / "ant" / "3.jpg").write_bytes(b"<html>")
    (photos / "bee" / "4.jpg").unlink()
    (photos / "bee" / "4.jpg").symlink_to(photos / "nowhere.jpg")
    (photos / "cow" / "1.jpg").write_bytes(b"")
    lines: list[str] = []
    made = _make(photos, tmp_path / "out", max_failed=0.09, progress=lines.append)
    assert made.info.failed == 3 and made.info.train.samples + made.info.eval.samples == 33
    assert lines[-1].endswith(
        "left out 1 image that failed (is a dangling symbolic link) and 2 images that failed (is not an image); "
        "failed.jsonl names those that failed"
    )
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert {(Path(entry["image"]).name, entry["reason"]) for entry in failed} == {
        ("3.jpg", "is not an image"),
        ("1.jpg", "is not an image"),
        ("4.jpg", "is a dangling symbolic link"),
    }
    counts = made.info.train.shards | made.info.eval.shards
    assert all(len(list(read_shard(str(tmp_path / "out" / name)))) == count for name, count in counts.items())
    with pytest.raises(
        UserError, match=r"3 of \d+ images failed, more than --max-failed 0.06 allows; the last one, .*jpg"
    ):
        _make(photos, tmp_path / "less", max_failed=0.06)


def test_disk_full_leaves_nothing_behind(photos, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write to .*out \(No space left on device\)"):
            _make(photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_disk_full_keeps_whole_shards(photos, tmp_path, monkeypatch):
    real, synced = os.fsync, []

    def full_later(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 8:  # two shards and their receipts, each with its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    _make(photos, tmp_path / "out", plan_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_later)
        with pytest.raises(UserError, match="No space left"):
            _make(photos, tmp_path / "out", workers=1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        UNFINISHED_NAME,
        "train-000000.tar",
        "train-000001.tar",
    ]
    _make(photos, tmp_path / "out")
    _make(photos, tmp_path / "whole")
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


@pytest.mark.parametrize("option", ["size=64k", "nr_inodes=12"])
def test_a_disk_without_room_or_inodes(photos, tmp_path, option):
    """On a file system of its own, for which root is needed. The advice is followed: room is made, and it continues."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        (disk / "ballast").mkdir()
        for number in range(4):
            (disk / "ballast" / str(number)).write_bytes(bytes(4096))
        message = r"cannot write to .*out \(No space left on device\): make room"
        with pytest.raises(UserError, match=message):
            _make(photos, disk / "out", workers=1, samples_per_shard=4)
        subprocess.run(["mount", "-o", "remount,size=8m,nr_inodes=100", disk], check=True)
        _make(photos, disk / "out", workers=1, samples_per_shard=4)
        _make(photos, tmp_path / "whole", samples_per_shard=4)
        assert _contents(disk / "out") == _contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_destination_that_cannot_be_written(photos, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file/out \(Not a directory\): choose another --out"):
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
        ({"resize": 0}, "--resize is 0"),
        ({"quality": 101}, "--quality is 101"),
        ({"workers": 0}, "--workers is 0"),
        ({"part": (0, 4)}, "--part is 0/4"),
        ({"part": (5, 4)}, "--part is 5/4"),
        ({"max_failed": 1.0}, "--max-failed is 1.0"),
        ({"seed": -1}, "--seed is -1"),
        ({"labels": "a", "label_column": "b"}, "--labels and --label-column both name the column of labels"),
        ({"image_column": "a"}, "--image-column names a column of a list or of Parquet files, but .* is neither"),
        ({"label_column": "a"}, "--label-column names a column of a list or of Parquet files, but .* is neither"),
        ({"format": "zip"}, "--format is zip: it must be one of cifar, class-folders, class-tars"),
        ({"eval_fraction": 0.001}, "36 images are too few for --eval-fraction 0.001: set --eval-fraction 0.5"),
    ],
)
def test_bad_arguments(photos, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        _make(photos, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


# --- what is left out


def test_everything_that_is_not_used_is_counted_by_reason(tmp_path, photo, encode):
    root = tmp_path / "photos"
    for name in ("ant/0.jpg", "ant/deep/1.JPG", "bee/2.jfif"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(photo(len(name)))
    pixels = np.zeros((8, 8, 3), np.uint8)
    (root / "bee" / "3.ppm").write_bytes(encode(pixels, "PPM"))
    (root / "bee" / "4.jp2").write_bytes(encode(pixels, "JPEG2000"))
    (root / "bee" / "5.jpg").write_bytes(photo(len("ant/0.jpg")))  # as ant/0.jpg
    (root / "bee" / "6.png").write_bytes(b"no image")
    left_out = [
        "top.jpg",
        "README.md",
        "ant/no_suffix",
        "ant/a.txt",
        "ant/b.TXT",
        "ant/.c.jpg",
        "ant/._0.jpg",
        "ant/x.12 34",
    ]
    for name in left_out:
        (root / name).touch()
    (root / ".cache").mkdir()
    os.mkfifo(root / "ant" / "pipe.jpg")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    (root / "bee" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    lines: list[str] = []
    made = _make(root, tmp_path / "out", eval_fraction=0.0, dedup=True, max_failed=0.4, progress=lines.append)
    assert made.info.left_out == {
        ".md file": 1,
        ".txt file": 2,
        "duplicate": 1,
        "file with an unusual suffix": 1,
        "file without a suffix": 1,
        "hidden file": 1,
        "hidden folder": 1,
        "image beside the class folders": 1,
        "image that failed (is a dangling symbolic link)": 2,
        "image that failed (is not an image)": 1,
        "macOS resource file": 1,
        "special file": 1,
    }
    assert made.info.failed == 3 and made.info.train.samples == 5 and made.info.classes == ["ant", "bee"]
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["left_out"] == made.info.left_out
    assert (
        "; left out 1 .md file, 2 .txt files, 1 duplicate, 1 file with an unusual suffix, 1 file without" in lines[-1]
    )
    assert lines[-1].endswith("1 macOS resource file and 1 special file; failed.jsonl names those that failed")
    assert lines[0].startswith(
        f"{root}: a folder of classes: 9 images, 0 of each class to evaluate on; 2 class names in "
        "alphabetical order: ant, bee; left out: 1 .md file, 2 .txt files, "
    )


def test_the_first_line_says_how_several_labels_are_read(tmp_path, photo):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(photo(number))
    rows = ["0.jpg,ant;bee;cat", "1.jpg,ant", "2.jpg,bee;cat", "3.jpg,cat"]
    (tmp_path / "list.csv").write_text("\n".join(["path,labels", *rows]) + "\n")
    lines: list[str] = []
    make_dataset(str(tmp_path / "list.csv"), tmp_path / "out", eval_fraction=0, workers=1, progress=lines.append)
    keys = re.search(r"up to 3 per image \(read them with (.*) and (.*)\)", lines[0])
    assert keys
    config = load_config(
        None, [*keys.groups(), "loss.kind=sigmoid", "model.num_classes=3", f"data.train={tmp_path}/out"]
    )
    data = prepare_data(config.config, world_size=1, index_folder=tmp_path)
    assert data.class_names == ["ant", "bee", "cat"]


@pytest.mark.parametrize("link", ["gone", "bee/gone.jpg", "bee/gone"])
def test_a_dangling_link_is_a_failure(photos, tmp_path, link):
    (photos / link).symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"{link} is a dangling symbolic link: repair it, or leave bad images out"):
        _make(photos, tmp_path / "out")
    made = _make(photos, tmp_path / "out", max_failed=0.04)
    assert made.info.failed == 1 and made.info.train.samples + made.info.eval.samples == 36


def _rows_of(form: str, folder: Path, photo) -> Path:
    """20 rows of two classes in a table; three of them cannot be used."""
    pyarrow = pytest.importorskip("pyarrow") if form == "parquet" else None
    rows: list[dict] = [{"image": f"{n}.jpg", "label": n % 2} for n in range(20)]
    rows[4]["image"], rows[7]["label"] = None, None
    for n in range(20):
        (folder / f"{n}.jpg").write_bytes(photo(n) if n != 9 else b"<html>")
    path = folder / f"list.{form}"
    if form == "csv":
        lines = [f"{row['image'] or ''},{'' if row['label'] is None else float(row['label'])}" for row in rows]
        path.write_text("\n".join(["image,label", *lines]))
    elif form == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        assert pyarrow is not None
        for row in rows:
            name = row["image"]
            row["image"] = {"bytes": (folder / name).read_bytes() if name else None, "path": name}
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_rows_that_cannot_be_used_are_named_once_and_the_rest_is_made(tmp_path, photo, form):
    path = _rows_of(form, tmp_path, photo)
    with pytest.raises(UserError, match=r"(line|row) \d+ in .* has no|9\.jpg.* is not an image"):
        _make(path, tmp_path / "out")
    lines: list[str] = []
    made = _make(path, tmp_path / "out", max_failed=0.15, progress=lines.append)
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    lost = "has no image bytes in 'image'" if form == "parquet" else "has no path or URL of an image"
    row = {"csv": "line {} in", "jsonl": "line {} in", "parquet": "row {} in"}[form]
    first = {"csv": 2, "jsonl": 1, "parquet": 0}[form]
    bad = f"list/9.jpg in {path}" if form == "parquet" else str(tmp_path / "9.jpg")
    assert sorted((entry["image"], entry["reason"]) for entry in failed) == sorted(
        [
            (f"{row.format(first + 4)} {path}", lost),
            (f"{row.format(first + 7)} {path}", "has no label"),
            (bad, "is not an image"),
        ]
    )
    assert made.info.failed == 3 and sum(made.info.left_out.values()) == 3 and made.info.classes == ["0", "1"]
    labels = {image: label for split in ("train", "eval") for _, image, label in _triples(tmp_path / "out", split)}
    assert labels == {photo(n): str(n % 2) for n in range(20) if n not in (4, 7, 9)}
    with pytest.raises(UserError, match="more than --max-failed 0.1 allows"):
        _make(path, tmp_path / "less", max_failed=0.1)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_class_names_in_any_encoding(photos, tmp_path, encoding):
    (tmp_path / "classes.txt").write_bytes("cow\n\n ant \r\nbee\nödland\n".encode(encoding))
    made = _make(photos, tmp_path / "out", classes=tmp_path / "classes.txt")
    assert made.info.classes == ["cow", "ant", "bee", "ödland"]
    labels = Counter(label for split in ("train", "eval") for _, _, label in _triples(tmp_path / "out", split))
    assert labels == {"0": 5, "1": 20, "2": 11}


# --- what is done to images


def test_resize_shrinks_large_images_only(tmp_path, photo, encode):
    sizes = {"tall": (90, 60), "wide": (50, 200), "exact": (48, 70), "small": (20, 300)}
    for name, (height, width) in sizes.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "a.jpg").write_bytes(photo(1, height, width))
    rng = np.random.default_rng(0)
    png = encode(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8), "PNG")
    (tmp_path / "photos" / "tall" / "b.png").write_bytes(png)
    _make(tmp_path / "photos", tmp_path / "out", resize=48, eval_fraction=0.0)
    samples = {sample["__key__"]: sample for sample in _samples(tmp_path / "out", "train")}
    assert [decode_image(samples[key]["jpg"]).shape[:2] for key in sorted(samples)] == [
        (48, 70),
        (20, 300),
        (72, 48),
        (48, 48),
        (48, 192),
    ]
    assert samples["00000000_a"]["jpg"] == photo(1, 48, 70) and samples["00000001_a"]["jpg"] == photo(1, 20, 300)
    bigger = _make(tmp_path / "photos", tmp_path / "high", resize=48, quality=99, eval_fraction=0.0)
    assert sum((tmp_path / "high" / name).stat().st_size for name in bigger.info.train.shards) > sum(
        path.stat().st_size for path in (tmp_path / "out").glob("*.tar")
    )


def test_extension_follows_the_content_and_other_formats_become_png(tmp_path, encode):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "0.jpeg").write_bytes(encode(pixels, "PNG"))  # as one of ImageNet's is
    (tmp_path / "photos" / "a" / "1.bmp").write_bytes(encode(pixels, "BMP"))
    (tmp_path / "photos" / "a" / "2.webp").write_bytes(encode(pixels, "WEBP", lossless=True))
    _make(tmp_path / "photos", tmp_path / "out", eval_fraction=0.0)
    found = {s["__key__"]: s for s in _samples(tmp_path / "out", "train")}
    extensions = [next(name for name in found[key] if name in ("jpg", "png", "webp", "bmp")) for key in sorted(found)]
    assert extensions == ["png", "png", "webp"]
    for key, extension in zip(sorted(found), extensions, strict=True):
        assert np.array_equal(decode_image(found[key][extension]), pixels)


def test_dedup_keeps_one_of_each_image(photos, tmp_path):
    for copy in ("ant/0.jpg", "ant/1.jpg"):
        (photos / "cow" / copy.replace("/", "-")).write_bytes((photos / copy).read_bytes())
    lines: list[str] = []
    made = _make(photos, tmp_path / "out", dedup=True, progress=lines.append)
    assert made.info.duplicates == 2 and "left out 2 duplicates" in lines[-1]
    found = _triples(tmp_path / "out", "train") + _triples(tmp_path / "out", "eval")
    assert len(found) == 36 == len({image for _, image, _ in found})
    labels = {image: label for _, image, label in found}
    assert labels[(photos / "ant/0.jpg").read_bytes()] == "0"  # the first in the source's order
    assert _make(photos, tmp_path / "both").info.train.samples == 30


def test_dedup_takes_what_is_held_out_from_the_training_images(tmp_path, photo):
    for split, numbers in (("train", (1, 2, 3, 4)), ("val", (3, 9))):
        for number in numbers:
            path = tmp_path / "photos" / split / "a" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo(number))
    made = _make(tmp_path / "photos", tmp_path / "out", dedup=True, eval_fraction=None)
    assert made.info.train.samples == 3 and made.info.eval.samples == 2 and made.info.eval_fraction is None
    assert photo(3) in {image for _, image, _ in _triples(tmp_path / "out", "eval")}


def test_own_split_refuses_a_fraction(tmp_path, photo):
    for split in ("train", "test"):
        (tmp_path / "photos" / split / "a").mkdir(parents=True)
        (tmp_path / "photos" / split / "a" / "0.jpg").write_bytes(photo(0))
    with pytest.raises(UserError, match="has an eval split of its own: leave out --eval-fraction"):
        _make(tmp_path / "photos", tmp_path / "out")


def test_memory_of_a_worker_does_not_hold_the_data(tmp_path):
    """120 images of 0.5 MB: far more than a process grows by."""
    source = tmp_path / "photos" / "a"
    source.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (400, 400, 3), dtype=np.uint8)).save(source / f"{number}.png")
    for number in range(8, 120):
        os.link(source / f"{number % 8}.png", source / f"{number}.png")

    def peak(pipe) -> None:
        before = _peak_memory()
        _make(tmp_path / "photos", tmp_path / "out", eval_fraction=0.0, samples_per_shard=60, workers=1)
        pipe.send(_peak_memory(children=True) - before)

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=peak, args=(sender,))
    process.start()
    grown = receiver.recv()
    process.join()
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar")) > 55e6
    assert grown < 20e6


def _peak_memory(children: bool = False) -> int:
    import resource

    who = resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF
    return resource.getrusage(who).ru_maxrss * 1024
