"""`fastvit data label`, with a teacher that is no model: a probability that grows with the brightness of an image."""

import json
import shutil

import numpy as np
import pytest

from fastvit_engine.config import load_config
from fastvit_engine.data.build.label import Teacher, label_shards
from fastvit_engine.data.build.make import make_dataset
from fastvit_engine.data.check.stats import shard_stats
from fastvit_engine.data.check.verify import verify_shards
from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.data.shards.index import open_index
from fastvit_engine.data.shards.names import UNFINISHED_NAME, read_info
from fastvit_engine.data.shards.soft_labels import SOFT_MEMBER, parse_soft_label
from fastvit_engine.errors import UserError

NAMES = ["dark", "bright", "neither"]


def _probabilities(images) -> np.ndarray:
    bright = np.stack(images).mean(axis=(1, 2, 3)) / 255
    return np.stack([0.9 * (1 - bright), 0.9 * bright, np.full_like(bright, 0.1)], 1).astype(np.float32)


def _classify(images, names, top):
    found = _probabilities(images)
    order = np.argsort(-found, axis=1)[:, :top]
    return order, np.take_along_axis(found, order, 1)


TEACHER = Teacher("runs/teacher", "abc", NAMES, _classify)


@pytest.fixture(scope="session")
def config():
    return load_config(
        None, ["model.name=Ti/4", "model.image_size=8", "model.num_classes=3", "data.max_bad_share=0"]
    ).config


def _label(source, out, config, teacher=TEACHER, **changes):
    said: list[str] = []
    arguments = {"batch_size": 4, "workers": 2, "progress": said.append} | changes
    label_shards(str(source), out, teacher, config, **arguments)
    return said


def _samples(folder):
    return [sample for shard in sorted(folder.glob("*.tar*")) for sample in read_shard(str(shard))]


def _bytes(folder):
    """Of the shards, and what dataset.json says."""
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}, read_info(folder)


def test_samples_keep_all_but_their_labels(shards, tmp_path, config):
    out = tmp_path / "out"
    said = _label(shards, out, config)
    before, after = _samples(shards), _samples(out)
    assert [sample["__key__"] for sample in after] == [sample["__key__"] for sample in before]
    assert [sample["jpg"] for sample in after] == [sample["jpg"] for sample in before]
    for sample in after:
        soft = parse_soft_label(sample[SOFT_MEMBER])
        assert soft.num_classes == 3 and soft.rest == 0 and sample["cls"] == str(soft.classes[0]).encode()
        assert soft.probabilities[soft.classes == 2] == np.float32(0.1)
    info = read_info(out)
    assert info.classes == NAMES and info.train.samples == 35 and info.eval.samples == 0
    assert list(info.train.shards.values()) == [5, 3, 8, 6, 1, 5, 7] and info.source == str(shards)
    assert (info.teacher.model, info.teacher.kind, info.teacher.held) == ("runs/teacher", "soft", pytest.approx(1))
    counts = open_index(out / "shards.index").class_counts()
    assert counts == {label: [s["cls"] for s in after].count(str(label).encode()) for label in counts}
    assert len(said) == 1 and "35 train samples in 7 shards, of 2 of 3 classes with " in said[0]
    assert not verify_shards(str(out), config).errors
    stats = shard_stats(str(out), config, workers=1)
    assert stats.soft.count == 35 and "35 with soft labels" in stats.report()


def test_source_labels_are_not_needed(tmp_path, photo, write_tar, config):
    source = tmp_path / "web"
    source.mkdir()
    write_tar(source / "0.tar.gz", [(f"a/{n}.{suffix}", content) for n in range(3)
                                    for suffix, content in (("jpg", photo(n)), ("txt", b"a caption"))])  # fmt: skip
    _label(source, tmp_path / "out", config)
    after = _samples(tmp_path / "out")
    assert [(sample["__key__"], sample["txt"]) for sample in after] == [(f"a/{n}", b"a caption") for n in range(3)]


def test_some_of_the_classes_and_what_they_hold(shards, tmp_path, config):
    _label(shards, tmp_path / "out", config, top=1)
    soft = [parse_soft_label(sample[SOFT_MEMBER]) for sample in _samples(tmp_path / "out")]
    teacher = read_info(tmp_path / "out").teacher
    assert {len(label.classes) for label in soft} == {1}
    assert teacher.held == pytest.approx(np.mean([label.held for label in soft]), abs=1e-6)
    assert teacher.least_held == pytest.approx(min(label.held for label in soft), abs=1e-6)


def test_hard_labels_above_a_threshold(shards, tmp_path, config):
    _label(shards, tmp_path / "all", config)
    best = {s["__key__"]: parse_soft_label(s[SOFT_MEMBER]).probabilities[0] for s in _samples(tmp_path / "all")}
    threshold = float(np.median(list(best.values())))
    said = _label(shards, tmp_path / "out", config, hard=True, threshold=threshold)
    after = _samples(tmp_path / "out")
    assert [sample["__key__"] for sample in after] == [key for key, p in best.items() if p >= threshold]
    assert all(SOFT_MEMBER not in sample for sample in after)
    info = read_info(tmp_path / "out")
    assert info.teacher.kind == "hard" and info.teacher.held is None
    assert info.left_out == {f"most probable class below {threshold:g}": 35 - len(after)}
    assert info.train.samples == len(after) and f"below {threshold:g}" in said[-1]
    with pytest.raises(UserError, match=r"no image of .* is left, of 35 images: lower --threshold 0\.999"):
        _label(shards, tmp_path / "none", config, threshold=0.999)
    assert not (tmp_path / "none").exists()


def test_a_labelling_that_was_stopped_resumes_to_the_same_bytes(shards, tmp_path, config):
    seen: list[str] = []

    def stops(images, names, top):
        seen.extend(names)
        if len(seen) > 12:
            raise KeyboardInterrupt
        return _classify(images, names, top)

    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(shards, source)
    with pytest.raises(KeyboardInterrupt):
        _label(source, out, config, TEACHER._replace(classify=stops))
    assert sorted(path.name for path in out.iterdir()) == [UNFINISHED_NAME, "train-000000.tar", "train-000001.tar"]
    with pytest.raises(UserError, match="labelled by a model with other weights: name that one"):
        _label(source, out, config, TEACHER._replace(weights="other"))
    with pytest.raises(UserError, match=r"is being made without --threshold, not with --threshold 0\.5"):
        _label(source, out, config, threshold=0.5)
    shutil.move(source / "part-6.tar", tmp_path)
    with pytest.raises(UserError, match="has other shards than when"):
        _label(source, out, config)
    shutil.move(tmp_path / "part-6.tar", source)
    said = _label(source, out, config)
    assert "2 of 7 shards are complete, labelling the others" in said[0]
    _label(source, tmp_path / "whole", config)
    assert _bytes(out) == _bytes(tmp_path / "whole") and not (out / UNFINISHED_NAME).exists()
    assert _label(source, out, config) == [f"{out} is already labelled: 35 train samples"]
    (out / "train-000003.tar").unlink()
    with pytest.raises(UserError, match=r"train-000003\.tar, which its dataset\.json lists, does not exist"):
        _label(source, out, config)


def test_parts_make_what_one_process_makes(shards, tmp_path, config):
    out = tmp_path / "out"
    assert "part 1 of 2 is complete, 3 shards are left" in _label(shards, out, config, part=(1, 2))[0]
    assert read_info(out) is None
    _label(shards, out, config, part=(2, 2))
    _label(shards, tmp_path / "whole", config)
    assert _bytes(out) == _bytes(tmp_path / "whole")


def test_images_that_fail_are_named_and_counted(tmp_path, photo, write_tar, config):
    source = tmp_path / "web"
    source.mkdir()
    write_tar(source / "0.tar", [("a.jpg", photo(0)), ("b.jpg", b"none"), ("c.txt", b"no image")])
    with pytest.raises(UserError, match=r"sample 'b' .* cannot be decoded .*: repair it, or leave bad images out with"):
        _label(source, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    said = _label(source, tmp_path / "out", config, max_failed=0.7)
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert ["'b'" in failed[0]["image"], "'c'" in failed[1]["image"]] == [True, True]
    assert read_info(tmp_path / "out").left_out == {"image that failed": 2} and "failed.jsonl names those" in said[-1]


def test_soft_labels_are_not_lost_when_shards_are_made_again(shards, tmp_path, config):
    _label(shards, tmp_path / "out", config)
    with pytest.raises(UserError, match="has a teacher's soft labels, which would be lost"):
        make_dataset(str(tmp_path / "out"), tmp_path / "again", workers=1, progress=lambda text: None)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hard": True, "top": 2}, "--hard writes one class, and --top says how many"),
        ({"threshold": 0.2}, r"the most probable of 3 classes always has 0\.33"),
        ({"threshold": 1.5}, "it must be above that, and at most 1"),
        ({"part": (3, 2)}, "--part is 3/2"),
        ({"top": 0}, "--top is 0: it must be at least 1"),
    ],
)
def test_arguments_that_make_no_sense(shards, tmp_path, config, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        _label(shards, tmp_path / "out", config, **changes)


def test_a_folder_with_anything_else_is_left_alone(shards, tmp_path, config):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and was not made by `fastvit data label`"):
        _label(shards, tmp_path, config)
