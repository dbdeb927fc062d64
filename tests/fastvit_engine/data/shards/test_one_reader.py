"""Index, training, verify, stats and a stream say the same of any archive: keys, labels, and what is usable."""

import gzip
import io
import json
import tarfile
from collections import Counter as Tally
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvit_engine.config import Config
from fastvit_engine.data import TrainingData
from fastvit_engine.data.build.parallel import Counter
from fastvit_engine.data.check import stats, verify
from fastvit_engine.data.shards.index import write_index
from fastvit_engine.data.shards.sample import parse_sample
from fastvit_engine.data.shards.usable import SampleKeys
from fastvit_engine.data.stream.indexed import IndexedData, IndexedShards, TrainSource
from fastvit_engine.data.stream.streams import StreamData, StreamedShards, plan_streams
from fastvit_engine.errors import UserError
from fastvit_engine.shown import shown
from fastvit_engine.storage import ShardStorage
from tests.in_full import IN_FULL

CLASSES = 4


def _encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(8 * 9 * 3, dtype=np.uint8).reshape(8, 9, 3)).save(buffer, format)
    return buffer.getvalue()


JPEG, PNG = _encoded("JPEG"), _encoded("PNG")


# ---- archives, and what is in them


@dataclass
class Drawn:
    """A sample of a drawn archive, and what is true of it."""

    key: str
    members: list[tuple[str, bytes]]  # name, content
    labels: list[int] | None  # None: none that training takes
    parses: bool  # as labels at all; the index refuses other shards
    image: bool  # usable


@dataclass
class Archive:
    config: Config = field(repr=False)
    samples: list[Drawn]
    content: bytes = field(repr=False)
    damaged: bool
    ignored: int


KEYS = st.sampled_from(
    ["a", "b", "dir/a", "dir.d/a", "./x", "k=1 2", "käse", "../up", "deep/" * 30 + "n", "\udcff", "0", "A", "__x__"]
)
IMAGES = [
    (JPEG, True),
    (PNG, True),
    (JPEG[: len(JPEG) - 20], True),
    (PNG[:45], False),
    (b"<html>", False),
    (b"", False),
]
# content of a label member or field -> the labels in it, None for what is no class index
LABELS: list[tuple[object, list[int] | None]] = [
    (0, [0]), (3, [3]), ([1, 2], [1, 2]), ([2], [2]), ([], []), (4, [4]), (-1, [-1]), (None, []),
    ([0, 1, 2, 3], [0, 1, 2, 3]),
    (True, None), ([True], None), ("cat", None), (1.0, None), ({"x": 1}, None), ([[1]], None),
]  # fmt: skip
IGNORED = ["._a.jpg", "dir/._a.jpg", "__MACOSX/a.jpg", "README", ".x"]
MARKS = st.sampled_from([b"", b"\xef\xbb\xbf"])


@st.composite
def archives(draw: st.DrawFn) -> Archive:
    label_key = draw(st.sampled_from(["cls", "json.label", "json.a.b", "txt"]))
    image_key = draw(st.sampled_from(["jpg;png", "png;jpg", "photo.jpg", "JPG".lower()]))
    max_labels = draw(st.integers(1, 3))
    member, _, path = label_key.partition(".")
    samples = []
    for key in draw(st.lists(KEYS, max_size=5, unique=True)):
        members: list[tuple[str, bytes]] = []
        labels, parses = None, True
        if draw(st.booleans()) or draw(st.booleans()):
            value, found = draw(st.sampled_from(LABELS))
            for name in reversed(path.split(".") if path else []):
                value = {name: value}
            text = json.dumps(value)
            if not path and value == "cat":
                text = draw(st.sampled_from(["cat", "", "1_0", "[1", "0x1"]))
            members.append((member, draw(MARKS) + text.encode() + draw(st.sampled_from([b"", b"\n"]))))
            parses = found is not None
            usable = found is not None and 1 <= len(found) <= max_labels and all(0 <= n < CLASSES for n in found)
            labels = found if usable else None
        images = {}
        for extension in draw(st.lists(st.sampled_from(["jpg", "png", "photo.jpg"]), max_size=2, unique=True)):
            content, images[extension] = draw(st.sampled_from(IMAGES))
            members.append((draw(st.sampled_from([extension, extension.upper()])), content))
        image = next((images[name] for name in image_key.split(";") if name in images), False)
        if draw(st.booleans()) or not members:
            members.append(("other.bin", b"x" * 7))
        members = [(f"{key}.{extension}", content) for extension, content in draw(st.permutations(members))]
        samples.append(Drawn(key, members, labels, parses, image))
    files = [pair for sample in samples for pair in sample.members]
    damaged = False
    if samples and draw(st.integers(0, 5)) == 0:  # a member twice, or away from its sample
        files.append(draw(st.sampled_from(files)))
        damaged = True
    ignored = 0
    for name in draw(st.lists(st.sampled_from(IGNORED), max_size=3)):
        files.insert(draw(st.integers(0, len(files))), (name, b"ignored"))
        ignored += 1
    formats = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    content = _tar(files, draw(formats))
    if draw(st.integers(0, 5)) == 0:
        content = content[: draw(st.integers(0, len(content.rstrip(b"\0")) // 512 * 512))]
        damaged = True
    settings = {"label_key": label_key, "image_key": image_key, "max_labels": max_labels}
    config = Config.model_validate(
        {
            "model": {"name": "Ti/4", "image_size": 8, "num_classes": CLASSES},
            "data": {"num_workers": 0, "shuffle_buffer": 1, "train": "x"} | settings,
            "train": {"global_batch_size": 1},
        }
    )
    return Archive(config, samples, content, damaged, ignored)


def _tar(files: list[tuple[str, bytes]], format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, errors="surrogateescape") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


# ---- what each of the readers says of an archive


@dataclass
class Told:
    """(key, labels or None, image usable) of each sample up to where the reader stopped, and why it did."""

    samples: list[tuple[str, list[int] | None, bool]]
    stopped: str | None = None


def _training(data: TrainingData, config: Config, count: int | None) -> Told:
    """One sample per batch: the evaluation's pass, or `count` samples of training."""
    told = Told([])
    options = {"rank": 0, "world_size": 1, "pin_memory": False}
    try:
        if count is None:
            batches = data.eval_batches(config, batch_size=1, **options)
        else:
            batches = data.train_batches(config, micro_batch_size=1, consumed=0, **options)
        for _, batch in zip(range(count if count is not None else 10**9), batches, strict=False):
            usable = bool(batch.weights[0])
            labels = [n for n in np.atleast_1d(batch.labels[0].numpy()).tolist() if n >= 0]
            told.samples.append((batch.keys[0], labels if usable else None, usable))
    except UserError as error:
        told.stopped = str(error)
    return told


def _indexed(path: Path, config: Config) -> IndexedData:
    index = write_index([str(path)], path.with_suffix(".index"), label_key=config.data.label_key)
    shards = IndexedShards.of(index)
    return IndexedData((TrainSource(shards, 1.0, index.samples, 1),), shards, index.samples)


def _keys_by_index(data: IndexedData) -> list[str]:
    assert data.eval is not None
    index = data.eval.open()
    storage = ShardStorage(index.shards, index.sizes)
    offsets, lengths = index.extents(np.zeros(index.samples, np.int64), np.arange(index.samples))
    contents = [storage.read(0, *extent) for extent in zip(offsets.tolist(), lengths.tolist(), strict=True)]
    return [parse_sample(content, index.shards[0])["__key__"] for content in contents]


def _hash(key: str) -> int:
    return int(np.frombuffer(blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), np.uint64)[0])


@settings(
    max_examples=300 if IN_FULL else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(archive=archives(), zipped=st.booleans())
def test_everybody_agrees(tmp_path_factory: pytest.TempPathFactory, archive: Archive, zipped: bool) -> None:
    folder = tmp_path_factory.mktemp("one", numbered=True)
    path = folder / "a.tar"
    path.write_bytes(archive.content)
    config, keys = archive.config, SampleKeys.of(archive.config.data)
    expected = [(sample.key, sample.labels, sample.image) for sample in archive.samples]
    stops_at = next((n for n, sample in enumerate(archive.samples) if sample.labels is None), None)

    # ---- verify
    seen = verify.verify_shard(str(path), keys, CLASSES, Counter())
    found = seen.findings
    assert ("damaged shard" in found) == archive.damaged
    if not archive.damaged:
        assert seen.keys.tolist() == [_hash(key) for key, _, _ in expected]
        assert seen.labels.tolist() == [labels[0] if labels else -1 for _, labels, _ in expected]
        unusable = {(key, kind) for kind, group in found.items() for key in _named(group.examples)}
        assert {key for key, kind in unusable if kind != "damaged image"} == {
            key for key, labels, image in expected if labels is None or not image
        }
        assert seen.ignored.total() == archive.ignored

    # ---- stats
    try:
        part = stats.summarize_shard(str(path), keys, CLASSES, quota=100)
    except UserError as error:
        assert archive.damaged and "a.tar is damaged" in str(error)
    else:
        assert not archive.damaged
        assert len(part.sizes) == part.pixel_images == sum(image for _, _, image in expected)
        assert part.labels == Tally(n for _, labels, _ in expected for n in labels or ())
        assert part.unusable.total() == sum((labels is None) + (not image) for _, labels, image in expected)
        assert part.ignored == seen.ignored

    # ---- training by streams
    streamed = path
    if zipped:
        streamed = folder / "a.tgz"
        streamed.write_bytes(gzip.compress(archive.content))
    shards = (str(streamed),)
    stream = StreamData(plan_streams(config, world_size=1, shards=1), shards, StreamedShards(shards), None)
    told = {"stream, evaluation": _training(stream, config, None)}
    told["stream, training"] = _training(stream, config, len(expected) + (archive.damaged or not expected))

    # ---- the index, and training by it
    try:
        indexed = _indexed(path, config)
    except UserError as error:
        refused = str(error)
        assert archive.damaged or not expected or any(not sample.parses for sample in archive.samples), refused
    else:
        assert not archive.damaged and expected and all(sample.parses for sample in archive.samples)
        assert _keys_by_index(indexed) == [key for key, _, _ in expected]
        assert indexed.eval is not None and indexed.eval.open().ignored[0] == seen.ignored
        told["indexed, evaluation"] = _training(indexed, config, None)
        told["indexed, training"] = _training(indexed, config, len(expected))

    for name, said in told.items():
        if archive.damaged or not expected:
            assert said.stopped, name
        elif stops_at is not None:
            assert said.stopped and said.stopped.startswith("sample '"), name
            if "evaluation" in name:
                assert said.stopped.startswith(shown(f"sample '{expected[stops_at][0]}' of shard")), name
        else:
            samples = sorted(said.samples, key=str) if "training" in name else said.samples
            wanted = [(key, labels if image else None, image) for key, labels, image in expected]
            assert not said.stopped and samples == (sorted(wanted, key=str) if "training" in name else wanted), name


def _named(examples: list[str]) -> list[str]:
    return [example.partition(" of a.tar ")[0] for example in examples]
