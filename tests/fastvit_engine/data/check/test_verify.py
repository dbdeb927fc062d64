import json
from pathlib import Path

import numpy as np
import pytest

from fastvit_engine.config import Config
from fastvit_engine.data.build.make import make_dataset
from fastvit_engine.data.check.stats import shard_stats
from fastvit_engine.data.check.verify import Verdict, verify_shards
from fastvit_engine.errors import UserError


@pytest.fixture
def write_shards(tmp_path, write_tar, photo):
    """write_shards([labels, labels, ...]) -> a folder of shards with a sample for each label; keys s0, s1, ..."""

    def write(shards: list[list[int]]) -> Path:
        number = 0
        for index, labels in enumerate(shards):
            members = []
            for label in labels:
                members += [(f"s{number}.jpg", photo(number)), (f"s{number}.cls", str(label).encode())]
                number += 1
            write_tar(tmp_path / f"{index}.tar", members)
        return tmp_path

    return write


def _verify(folder: Path, **changes) -> Verdict:
    return verify_shards(str(folder), **{"workers": 2} | changes)


def _counts(verdict: Verdict) -> dict[str, int]:
    return {kind: finding.count for kind, finding in verdict.findings.items()}


def test_whole_shards(shards):
    verdict = _verify(shards, skew=10)
    assert verdict.findings == {} and verdict.shards == 7 and verdict.samples == 35 and verdict.bytes > 35 * 600
    assert "no errors" in verdict.report() and "no warnings" in verdict.report()
    assert json.loads(verdict.to_json())["ok"] is True


@pytest.mark.parametrize("content", [bytes(10240), bytes(1024)])
def test_a_shard_without_samples(write_shards, content):
    folder = write_shards([[0, 1], [1, 0]])
    (folder / "1.tar").write_bytes(content)
    verdict = _verify(folder)
    assert verdict.errors["empty shard"].examples == [f"shard {folder / '1.tar'} holds no samples"]


def test_a_shard_that_dataset_json_does_not_list(tmp_path, photo, write_tar):
    for number in range(8):
        path = tmp_path / "in" / f"c{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number))
    made = tmp_path / "out"
    make_dataset(str(tmp_path / "in"), made, eval_fraction=0.25, workers=1, progress=lambda line: None)
    assert _verify(made).findings == {}
    (made / "train-000007.tar").write_bytes((made / "train-000000.tar").read_bytes())
    verdict = _verify(made)
    assert verdict.shards == 2 and list(verdict.warnings) == ["unlisted shard"] and verdict.errors == {}
    (example,) = verdict.warnings["unlisted shard"].examples
    assert example.startswith("train-000007.tar is not in dataset.json: a folder is read without it, and a pattern")


def test_real_photos_are_whole(real_data):
    verdict = verify_shards(str(real_data / "fixture-tiny"))
    assert verdict.errors == {} and verdict.samples == 64


@pytest.mark.parametrize("workers", [1, 3])
def test_damaged_shards(write_shards, workers):
    folder = write_shards([[0, 1, 2, 0, 1]] * 4)
    whole = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(whole[: len(whole) // 2])
    second = whole.index(b"s6.jpg")
    (folder / "2.tar").write_bytes((folder / "2.tar").read_bytes()[:3000] + b"")
    (folder / "3.tar").write_bytes(whole[:second] + bytes(512) + whole[second + 512 :])
    verdict = _verify(folder, workers=workers, skew=100)
    assert verdict.errors["damaged shard"].count == 3 and verdict.samples >= 5 and verdict.shards == 4
    assert any(
        "1.tar" in example and "whole samples" in example for example in verdict.findings["damaged shard"].examples
    )
    assert set(verdict.errors) == {"damaged shard"} or set(verdict.errors) == {"damaged shard", "duplicate key"}


def test_images_members_and_labels(tmp_path, write_tar, photo):
    large = photo(50, 300, 400)
    samples = {
        "cut": {"jpg": large[: len(large) // 2], "cls": b"0"},
        "html": {"png": b"<html>", "cls": b"1"},
        "blind": {"cls": b"1", "txt": b"x"},
        "mute": {"jpg": photo(1)},
        "word": {"jpg": photo(2), "cls": b"cat"},
        "far": {"jpg": photo(3), "cls": b"3"},
        "below": {"jpg": photo(4), "cls": b"-1"},
        "many": {"jpg": photo(5), "cls": b"0", "json": b'{"labels": [0, 2, 7]}'},
        "odd": {"jpg": photo(6), "cls": b"0", "json": b'{"labels": ["a"]}'},
        "text": {"jpg": photo(7), "cls": b"0", "json": b"{"},
        "huge": {"jpg": photo(9), "cls": b"99999999999"},
        "fine": {"jpg": photo(8), "cls": b"2", "json": b'{"labels": [2, 1]}'},
    }
    members = [(f"{key}.{name}", data) for key, parts in samples.items() for name, data in parts.items()]
    write_tar(tmp_path / "a.tar", members)
    verdict = _verify(tmp_path, num_classes=3)
    found = {
        kind: sorted(example.partition(" of a.tar ")[::2] for example in finding.examples)
        for kind, finding in verdict.findings.items()
    }
    assert set(found) == {"damaged image", "unreadable image", "missing member", "wrong label"} == set(verdict.errors)
    assert [key for key, _ in found["unreadable image"]] == ["html"]
    assert [key for key, _ in found["damaged image"]] == ["cut"]  # which training takes as far as it decodes
    assert found["missing member"] == [
        ("blind", "has no 'jpg;jpeg;png;webp' member, only ['cls', 'txt']"),
        ("mute", "has no 'cls' member, only ['jpg']"),
    ]
    assert found["wrong label"] == [
        ("below", "has label -1, outside 0..2"),
        ("far", "has label 3, outside 0..2"),
        ("huge", "has label 99999999999, outside 0..2"),
        ("word", "has the label b'cat' in 'cls', which is not a class index"),
    ]
    assert _counts(_verify(tmp_path))["wrong label"] == 3  # without a number of classes 3 may be right


def test_labels_and_images_under_the_keys_of_the_configuration(tmp_path, write_tar, photo):
    samples = {
        "many": b'{"labels": [0, 2, 7]}',
        "odd": b'{"labels": ["a"]}',
        "text": b"{",
        "true": b'{"labels": [true]}',
        "none": b'{"labels": []}',
        "fine": b'{"labels": [2, 1]}',
        "mark": b'\xef\xbb\xbf{"labels": 2}',
    }
    members = []
    for number, (key, content) in enumerate(samples.items()):
        members += [(f"{key}.photo.jpg", photo(number)), (f"{key}.jpg", b"<html>"), (f"{key}.json", content)]
    write_tar(tmp_path / "a.tar", [("._many.jpg", b"macOS"), *members])
    data = {"image_key": "photo.jpg", "label_key": "json.labels", "max_labels": 2}
    verdict = _verify(tmp_path, config=Config.model_validate({"data": data}), num_classes=3)
    found = {example.partition(" of a.tar ")[::2] for example in verdict.findings["wrong label"].examples}
    assert found == {
        ("many", "has 3 labels in 'json.labels', and training takes 1 to 2"),
        ("odd", "has the label b'{\"labels\": [\"a\"]}' in 'json.labels', which is not a class index"),
        ("text", "has the label b'{' in 'json.labels', which is not a class index"),
        ("true", "has the label b'{\"labels\": [true]}' in 'json.labels', which is not a class index"),
        ("none", "has 0 labels in 'json.labels', and training takes 1 to 2"),
    }
    assert _counts(verdict) == {"wrong label": 5} and verdict.ignored.total() == 1
    assert "1 macOS resource files" in verdict.report() and json.loads(verdict.to_json())["ignored"] == 1


def test_shards_on_a_server_that_speaks_s3(s3_bucket, tmp_path, write_tar, sample_members):
    for n in range(3):
        content = write_tar(tmp_path / "a.tar", sample_members(range(5 * n, 5 * n + 5))).read_bytes()
        s3_bucket.pipe_file(f"bucket/verify/{n}.tar", content)
    s3_bucket.pipe_file("bucket/verify/3.tgz", write_tar(tmp_path / "a.tar.gz", sample_members([15])).read_bytes())
    verdict = _verify("s3://bucket/verify", skew=10)
    assert verdict.findings == {} and (verdict.shards, verdict.samples) == (4, 16)
    stats = shard_stats("s3://bucket/verify/{0..2}.tar", workers=2)
    assert stats.images == 15 and stats.class_counts.tolist() == [5, 5, 5]


def test_a_shard_that_is_not_in_the_store(s3_bucket, tmp_path, write_tar, sample_members):
    s3_bucket.pipe_file("bucket/verify-one/a.tar", write_tar(tmp_path / "a.tar", sample_members(range(5))).read_bytes())
    assert _verify("s3://bucket/verify-one/*.tar", workers=1).findings == {}
    verdict = _verify("s3://bucket/verify-one/{a,gone}.tar", workers=1)
    assert set(verdict.errors) == {"unreadable shard"} and verdict.samples == 5


def test_duplicates_of_keys_and_images(tmp_path, write_tar, photo):
    write_tar(tmp_path / "a.tar", [("k1.jpg", photo(1)), ("k1.cls", b"0"), ("k2.jpg", photo(2)), ("k2.cls", b"0")])
    write_tar(tmp_path / "b.tar", [("k3.jpg", photo(2)), ("k3.cls", b"1"), ("k1.jpg", photo(3)), ("k1.cls", b"0")])
    verdict = _verify(tmp_path)
    assert verdict.errors["duplicate key"].examples == ["k1 of a.tar and k1 of b.tar"]
    assert verdict.warnings["duplicate image"].examples == ["k2 of a.tar and k3 of b.tar"]
    assert _counts(verdict) == {"duplicate key": 1, "duplicate image": 1}


def test_uneven_and_unshuffled_shards(write_shards):
    rng = np.random.default_rng(0)
    shuffled = [rng.integers(0, 10, 40).tolist() for _ in range(12)]
    assert _verify(write_shards(shuffled)).findings == {}
    verdict = _verify(write_shards([*shuffled, [7] * 40, [1] * 3]))
    assert verdict.errors == {}
    (uneven,) = verdict.warnings["uneven shard"].examples
    (sorted_shard,) = verdict.warnings["shard that is not shuffled"].examples
    assert uneven == "13.tar holds 3 samples, the median shard 40"
    assert sorted_shard.startswith("12.tar holds 40 samples of class 7, of which ")
    assert "uneven shard" not in _verify(write_shards([*shuffled, shuffled[0], shuffled[1][:30]]), skew=2).findings
    assert "uneven shard" in _verify(write_shards([*shuffled, shuffled[0], shuffled[1][:30]]), skew=1.2).findings


def test_dataset_json_is_compared(tmp_path, photo):
    for number in range(24):
        path = tmp_path / "in" / f"c{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number if number != 5 else 3))
    out = tmp_path / "out"
    make_dataset(
        str(tmp_path / "in"), out, eval_fraction=0.25, samples_per_shard=6, workers=1, progress=lambda line: None
    )
    kinds = _counts(_verify(out))
    assert kinds in ({"duplicate image": 1}, {"image in train and eval": 1})
    info = json.loads((out / "dataset.json").read_text())
    (out / "train-000001.tar").unlink()
    info["train"]["shards"]["train-000000.tar"] = 7
    info["classes"] = ["c0"]
    (out / "dataset.json").write_text(json.dumps(info))
    verdict = _verify(out)
    assert (
        verdict.errors["missing shard"]
        .examples[0]
        .endswith("train-000001.tar, which dataset.json lists, does not exist")
    )
    assert verdict.errors["wrong sample count"].examples == ["train-000000.tar holds 6 samples, dataset.json says 7"]
    assert verdict.errors["wrong label"].count >= 6


def test_long_lists_are_cut_in_the_report(tmp_path, write_tar):
    write_tar(tmp_path / "a.tar", [(f"k{n}.{name}", b"0") for n in range(30) for name in ("jpg", "cls")])
    verdict = _verify(tmp_path)
    assert verdict.findings["unreadable image"].count == 30 and len(verdict.findings["unreadable image"].examples) == 10
    assert "error: unreadable image, 30 found" in verdict.report() and "  and 20 more" in verdict.report()
    content = json.loads(verdict.to_json())
    assert content["ok"] is False and content["errors"]["unreadable image"]["count"] == 30


@pytest.mark.parametrize(
    ("argument", "changes", "message"),
    [
        ("{}/nothing-*.tar", {}, "matches no shards"),
        ("{}/none.tar", {}, "names the shard .*none.tar, which does not exist"),
        ("{}/a{{1.tar", {}, "Unbalanced braces"),
        ("{}", {"skew": 1.0}, "--skew is 1.0"),
        ("{}", {"num_classes": -1}, "--num-classes is -1"),
    ],
)
def test_bad_arguments(shards, argument, changes, message):
    with pytest.raises(UserError, match=message):
        verify_shards(argument.format(shards), **changes)
