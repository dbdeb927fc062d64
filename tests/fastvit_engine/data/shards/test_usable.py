"""What of a sample can be used, and what is said of the rest."""

import numpy as np
import pytest

from fastvit_engine.config import DataConfig
from fastvit_engine.data.pixels.decode import decode_image
from fastvit_engine.data.shards.soft_labels import SOFT_MEMBER, format_soft_label
from fastvit_engine.data.shards.usable import (
    SampleKeys,
    Unusable,
    judge,
    name_of,
    read_image,
    read_labels,
    read_soft_label,
)


def _sample(**members) -> dict:
    return {"__key__": "k1", "__url__": "a/b.tar"} | members


def test_read_image_takes_the_first_image_key(encode):
    pixels = np.arange(24 * 36 * 3, dtype=np.uint8).reshape(24, 36, 3)
    sample = _sample(png=encode(pixels, "PNG"), webp=b"not this", cls=b" 7\n")
    assert np.array_equal(read_image(sample, SampleKeys.of(DataConfig()), decode_image), pixels)
    assert read_labels(sample, SampleKeys.of(DataConfig()), num_classes=8) == [7]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"cls": b"0"}, "has no 'jpg;jpeg;png;webp' member, only"),
        ({"jpg": b"x", "cls": b"0"}, "has an image in 'jpg' that cannot be decoded"),
    ],
)
def test_unusable_images_are_told_apart_from_errors(members, message):
    with pytest.raises(Unusable, match=message):
        read_image(_sample(**members), SampleKeys.of(DataConfig()), decode_image)


@pytest.mark.parametrize(
    ("members", "label_key", "message"),
    [
        ({"jpg": b"x"}, "cls", "has no 'cls' member"),
        ({"cls": b"cat"}, "cls", "label b'cat'"),
        ({"cls": b""}, "cls", "label b''"),
        ({"cls": b"8"}, "cls", r"label 8, outside 0\.\.7"),
        ({"cls": b"-1"}, "cls", "label -1, outside"),
        ({"cls": b"[1, 2]"}, "cls", "has 2 labels in 'cls', and training takes 1 to 1"),
        ({"json": b"{}"}, "json.label", "has 0 labels in 'json.label'"),
        ({"json": b'{"a": {"b": 9}}'}, "json.a.b", r"label 9, outside 0\.\.7"),
    ],
)
def test_bad_labels_are_named(members, label_key, message):
    with pytest.raises(Unusable, match=message):
        read_labels(_sample(**members), SampleKeys.of(DataConfig(label_key=label_key)), num_classes=8)


@pytest.mark.parametrize("members", [{}, {"cls": b"cat"}, {"cls": b"-1"}, {"cls": b"[1, 2]"}])
def test_without_classes_labels_are_not_read(members):
    assert read_labels(_sample(**members), SampleKeys.of(DataConfig()), num_classes=0) == [0]


def test_several_labels():
    keys = SampleKeys.of(DataConfig(label_key="json.labels", max_labels=3))
    assert read_labels(_sample(json=b'{"labels": [3, 0]}'), keys, num_classes=8) == [3, 0]
    with pytest.raises(Unusable, match=r"has 4 labels in 'json\.labels', and training takes 1 to 3"):
        read_labels(_sample(json=b'{"labels": [3, 0, 1, 2]}'), keys, num_classes=8)
    with pytest.raises(Unusable, match=r"has label 8, outside 0\.\.7"):
        read_labels(_sample(json=b'{"labels": [3, 8]}'), keys, num_classes=8)


def test_labels_in_json():
    keys = SampleKeys.of(DataConfig(label_key="json.a.b"))
    assert read_labels(_sample(json=b'{"a": {"b": 3}}'), keys, num_classes=8) == [3]
    assert read_labels(_sample(json=b'{"a": {"b": [3]}}'), keys, num_classes=8) == [3]


def test_judge_says_everything_that_is_wrong():
    keys = SampleKeys.of(DataConfig())
    judged = judge(_sample(jpg=b"<html>", cls=b"cat"), keys, 8, decode_image)
    assert judged.labels is None and judged.image is None
    assert [problem.kind for problem in judged.problems] == ["wrong label", "unreadable image"]
    assert all(str(problem).startswith("has ") and problem.remedy for problem in judged.problems)
    assert judge(_sample(jpg=b"x", cls=b"1"), keys, 8, len) == ([1], None, 1, [])


def test_a_soft_label_that_training_could_not_use_is_wrong():
    keys = SampleKeys.of(DataConfig())
    half = format_soft_label(np.array([4, 2]), np.array([0.5, 0.5], np.float32), 8)
    judged = judge(_sample(jpg=b"x", cls=b"4") | {SOFT_MEMBER: half}, keys, 8, len)
    assert judged.soft is not None and judged.soft.classes.tolist() == [4, 2] and not judged.problems
    (problem,) = judge(_sample(jpg=b"x", cls=b"4") | {SOFT_MEMBER: half[:-8]}, keys, 8, len).problems
    assert problem.kind == "wrong label" and "in 'soft.npy' that are cut short" in str(problem)
    with pytest.raises(Unusable, match="has soft labels of 8 classes, and there are 7"):
        read_soft_label(_sample() | {SOFT_MEMBER: half}, 7)
    assert read_soft_label(_sample() | {SOFT_MEMBER: half}, 0) is None  # without classes
    assert name_of(_sample()) == "sample 'k1' of shard a/b.tar"
