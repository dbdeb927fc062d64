"""Every format of source, as a tiny instance of what people download."""

import csv
import gzip
import io
import json
import pickle
import re
import shlex
import struct
import sys
import tarfile
import tempfile
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastvit_engine.data.build.sources.reading as reading
from fastvit_engine.data.build.make import make_dataset
from fastvit_engine.data.build.sources import list_source, list_with_eval, recognise
from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.build.sources.devkit import validation_labels
from fastvit_engine.data.build.sources.listing import Listing
from fastvit_engine.data.build.sources.pixels import list_cifar
from fastvit_engine.data.build.sources.reading import SourceReader
from fastvit_engine.data.pixels.decode import decode_image
from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.data.shards.names import read_info
from fastvit_engine.errors import UserError
from fastvit_engine.observe.progress import WorkProgress
from tests.fastvit_engine.data.shards.tar_files import END, header


@pytest.fixture
def context(tmp_path) -> Context:
    return Context(tmp_path / "scratch", workers=2, progress=WorkProgress(quiet=True), say=lambda text: None)


@pytest.fixture
def listed(context) -> Callable[..., list[tuple]]:
    """listed(source, **context) -> (name, class names, held out, image bytes) of every image, as recognised"""

    def run(source: Path | str, format: str | None = None, **changes) -> list[tuple]:
        for name, value in changes.items():
            setattr(context, name, value)
        return _rows(list_source(str(source), format, context))

    return run


def _rows(listing: Listing) -> list[tuple]:
    reader = SourceReader(listing)
    return [
        (
            listing.name(index),
            [listing.classes[label] for label in listing.labels_of(index)],
            bool(listing.held_out[index]),
            reader.read(index).image,
        )
        for index in range(len(listing))
    ]


def _tar(members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


# --- scikit-learn's digits


def test_digits_are_lossless(listed):
    sklearn = pytest.importorskip("sklearn.datasets")
    scans, labels = sklearn.load_digits(return_X_y=True)
    rows = listed("digits")
    assert [label for _, (label,), _, _ in rows] == [str(label) for label in labels]
    assert len({name for name, *_ in rows}) == 1797
    for index in (0, 5, 1796):
        pixels = decode_image(rows[index][3])
        expected = np.rint(scans[index].reshape(8, 8) * 255 / 16)
        assert pixels.shape == (8, 8, 3) and all(np.array_equal(pixels[..., c], expected) for c in range(3))


def test_digits_without_scikit_learn(listed, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        listed("digits")


# --- folders


def _files(folder: Path, names: tuple[str, ...], photo) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(len(name)))


def test_folder(listed, tmp_path, photo):
    names = ("dog/b.JPG", "dog/deep/a.x.jpeg", "cat/z.jpg", "cat/a.jpg", "cat/notes.txt", ".git/x.jpg", "cat/.h/x.jpg")
    _files(tmp_path / "in", names, photo)
    assert [row[:3] for row in listed(tmp_path / "in")] == [
        ("cat/a.jpg", ["cat"], False),
        ("cat/z.jpg", ["cat"], False),
        ("dog/b.JPG", ["dog"], False),
        ("dog/deep/a.x.jpeg", ["dog"], False),
    ]
    assert listed(tmp_path / "in")[0][3] == photo(len("cat/a.jpg"))


def test_keys_have_no_dot_and_are_unique(tmp_path, photo):
    _files(tmp_path / "in", ("dog/a.x.jpeg", "cat/a.x.jpg"), photo)
    made = make_dataset(str(tmp_path / "in"), tmp_path / "out", eval_fraction=0, workers=1, progress=lambda line: None)
    keys = {s["__key__"] for name in made.info.train.shards for s in read_shard(str(tmp_path / "out" / name))}
    assert keys == {"00000000_a_x", "00000001_a_x"}


def test_class_names_that_look_the_same_are_refused(listed, tmp_path, photo):
    _files(tmp_path / "in", ("caf\u00e9/1.jpg", "cafe\u0301/2.jpg", "tea/3.jpg"), photo)  # as Linux and macOS write it
    with pytest.raises(UserError, match="two classes that both look like .*: rename one"):
        listed(tmp_path / "in")
    rows = listed(tmp_path / "in", classes=["cafe\u0301", "caf\u00e9", "tea"])
    assert [row[1] for row in rows] == [["cafe\u0301"], ["caf\u00e9"], ["tea"]]


def test_folder_of_splits(listed, tmp_path, photo):
    _files(tmp_path / "in", ("train/dog/1.jpg", "train/cat/1.jpg", "val/dog/7.jpg"), photo)
    assert [row[:3] for row in listed(tmp_path / "in")] == [
        ("cat/1.jpg", ["cat"], False),
        ("dog/1.jpg", ["dog"], False),
        ("dog/7.jpg", ["dog"], True),
    ]
    _files(tmp_path / "in", ("val/emu/7.jpg",), photo)
    with pytest.raises(UserError, match="the class 'emu' is in .*/val and not among the 2 classes to train"):
        listed(tmp_path / "in", classes=None)


def test_folders_that_cannot_serve(listed, tmp_path, photo):
    with pytest.raises(UserError, match="no folder or file"):
        listed(tmp_path / "nowhere")
    (tmp_path / "in").mkdir()
    for _ in range(2):
        with pytest.raises(UserError, match="has no sub-folders"):
            listed(tmp_path / "in")
        (tmp_path / "in" / "flat.jpg").write_bytes(photo(0))
    (tmp_path / "in" / "cat").mkdir()
    with pytest.raises(UserError, match=r"class folder .*cat holds no image"):
        listed(tmp_path / "in")


def test_given_class_names_set_the_order(context, tmp_path, photo):
    _files(tmp_path / "in", ("dog/1.jpg", "cat/1.jpg"), photo)
    context.classes = ["dog", "emu", "cat"]
    listing = list_source(str(tmp_path / "in"), None, context)
    assert listing.classes == ["dog", "emu", "cat"] and listing.labels.tolist() == [2, 0]


def test_folders_that_are_numbers_are_in_numeric_order(listed, context, tmp_path, photo):
    _files(tmp_path / "in", tuple(f"{n}/a.jpg" for n in range(1, 12)), photo)
    listing = list_source(str(tmp_path / "in"), None, context)
    assert listing.classes == [str(n) for n in range(1, 12)] and listing.order == "numeric"
    assert all(listing.name(n) == f"{listing.labels_of(n)[0] + 1}/a.jpg" for n in range(11))


@settings(deadline=None)
@given(st.lists(st.sampled_from(["jpg", "PPM", "txt", "", "jpg~", "xml", "avif", "7z", "tar.gz"]), min_size=1))
def test_every_file_of_a_folder_is_listed_or_counted(suffixes):
    with tempfile.TemporaryDirectory() as folder:
        for number, suffix in enumerate(["jpg", *suffixes]):
            path = Path(
                folder, "in", "ab"[number % 2 if number > 1 else 0], f"{number}.{suffix}" if suffix else f"{number}"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        Path(folder, "in", "b").mkdir(exist_ok=True)
        Path(folder, "in", "b", "0.jpg").touch()
        context = Context(Path(folder), 1, WorkProgress(quiet=True), lambda text: None)
        listing = list_source(str(Path(folder, "in")), "folder", context)
    images = sum(suffix.lower() in ("jpg", "ppm", "avif") for suffix in suffixes)
    assert len(listing) == 2 + images and len(listing) + sum(listing.left_out.values()) == 2 + len(suffixes)


# --- tars of ImageNet


@pytest.fixture
def class_tars(photo) -> dict[str, bytes]:
    """A tar for each of three classes, with 1, 2, and 3 images."""
    return {
        wnid: _tar([(f"{wnid}_{n}.JPEG", photo(10 * label + n)) for n in range(label + 1)])
        for label, wnid in enumerate(("n001", "n002", "n003"))
    }


EXPECTED = [("n001_0.JPEG", "n001", 0), ("n002_0.JPEG", "n002", 10), ("n002_1.JPEG", "n002", 11)]
EXPECTED += [(f"n003_{n}.JPEG", "n003", 20 + n) for n in range(3)]


@pytest.mark.parametrize("form", ["folder", "nested", "nested deep", "nested gzipped", "folder gzipped"])
def test_class_tars(listed, tmp_path, class_tars, photo, form):
    source = tmp_path / "in"
    if form.startswith("folder"):
        source.mkdir()
        for wnid, content in reversed(class_tars.items()):
            (source / f"{wnid}.tar").write_bytes(gzip.compress(content) if form.endswith("gzipped") else content)
    else:
        source = tmp_path / "winter21_whole.tar.gz"  # gzipped or not, the name is the same
        folder = "winter21_whole/" if form == "nested deep" else ""
        members = [(f"{folder}{wnid}.tar", content) for wnid, content in reversed(class_tars.items())]
        source.write_bytes(_tar(members, "w:gz" if form.endswith("gzipped") else "w"))
    assert recognise(str(source)) == "class-tars"
    assert listed(source) == [(name, [wnid], False, photo(number)) for name, wnid, number in EXPECTED]
    assert (tmp_path / "scratch").exists() == form.endswith("gzipped")  # nothing else is unpacked


def test_class_tars_with_long_names(listed, tmp_path, photo):
    name = "a" * 150 + ".JPEG"
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "all.tar", "w", format=format) as tar:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w", format=format) as class_tar:
                info = tarfile.TarInfo(name)
                info.size = len(photo(3))
                class_tar.addfile(info, io.BytesIO(photo(3)))
            info = tarfile.TarInfo("n001.tar")
            info.size = len(inner.getvalue())
            tar.addfile(info, io.BytesIO(inner.getvalue()))
        assert listed(tmp_path / "all.tar") == [(name, ["n001"], False, photo(3))]


def test_files_of_tars_that_are_no_images_are_counted(context, tmp_path, photo):
    members = [("a.jpg", photo(1)), ("b.PPM", b"x"), ("notes.txt", b"x"), ("._a.jpg", b"x"), (".DS_Store", b"x")]
    (tmp_path / "all.tar").write_bytes(_tar([("2.tar", _tar(members)), ("10.tar", _tar(members))]))
    listing = list_source(str(tmp_path / "all.tar"), None, context)
    assert listing.classes == ["2", "10"] and len(listing) == 4
    assert listing.left_out == {".txt file": 2, "macOS resource file": 2, "hidden file": 2}
    (tmp_path / "flat.tar").write_bytes(_tar(members))
    (tmp_path / "labels.txt").write_text("cat\nant\n")
    context.labels = str(tmp_path / "labels.txt")
    listing = list_source(str(tmp_path / "flat.tar"), "flat-tar", context)
    assert listing.left_out == {".txt file": 1, "macOS resource file": 1, "hidden file": 1}


def test_damaged_class_tars(listed, tmp_path, class_tars):
    whole = _tar([(f"{wnid}.tar", content) for wnid, content in class_tars.items()])
    path = tmp_path / "all.tar"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"all\.tar is damaged \(it is truncated"):
        listed(path)
    start = whole.index(b"n002_1.JPEG")  # the second header of the class
    path.write_bytes(whole[:start] + b"\xff" * 300 + whole[start + 300 :])
    with pytest.raises(UserError, match=rf"all\.tar is damaged \(it has a damaged header at byte {start:,}\)"):
        listed(path)
    path.write_bytes(whole[:start] + bytes(512) + whole[start + 512 :])  # looks like the end of the class
    with pytest.raises(UserError, match="it has data after its end marker, at byte"):
        listed(path)
    path.write_bytes(_tar([("n001.tar", class_tars["n001"]), ("n002.tar", _tar([]))]))
    with pytest.raises(UserError, match=r"class tar n002\.tar in .* holds no image"):
        listed(path)


VALIDATION = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 5)]


@pytest.fixture
def validation(tmp_path, photo) -> Path:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "ILSVRC2012_img_val.tar"
    path.write_bytes(_tar([(name, photo(90 + n)) for n, name in reversed(list(enumerate(VALIDATION)))]))
    return path


ROWS = [(1, "n003", "c", 0), (2, "n001", "a", 0), (3, "n002", "b", 0), (4, "n900", "group", 3)]


def _meta(rows=ROWS) -> bytes:
    """meta.mat: ids that are not in the order of the WordNet ids, and one for a group of classes."""
    savemat = pytest.importorskip("scipy.io").savemat
    kind = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    return buffer.getvalue()


def test_imagenet_folder_with_devkit(listed, tmp_path, class_tars, validation, photo):
    (tmp_path / "in" / "ILSVRC2012_img_train.tar").write_bytes(_tar([(f"{w}.tar", c) for w, c in class_tars.items()]))
    with pytest.raises(UserError, match=r"has ILSVRC2012_img_val\.tar but not its labels: put ILSVRC2012_devkit"):
        listed(tmp_path / "in")
    data = "ILSVRC2012_devkit_t12/data"
    members = [(f"{data}/meta.mat", _meta()), (f"{data}/ILSVRC2012_validation_ground_truth.txt", b"3\n1\n1\n2\n")]
    (tmp_path / "in" / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(_tar(members, "w:gz"))
    rows = listed(tmp_path / "in", labels=None, classes=None)
    assert rows[:6] == [(name, [wnid], False, photo(number)) for name, wnid, number in EXPECTED]
    assert [row[:3] for row in rows[6:]] == [
        (name, [wnid], True) for name, wnid in zip(VALIDATION, ("n002", "n003", "n003", "n001"), strict=True)
    ]
    assert [row[3] for row in rows[6:]] == [photo(90 + n) for n in range(4)]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(1, "n001"), (1, "n002")], "the class number 1.0 is no whole number or comes twice"),
        ([(1.5, "n001")], "the class number 1.5 is no whole number"),
        ([(1, "dog")], "class 1 has no WordNet id"),
    ],
)
def test_a_devkit_whose_classes_are_damaged_is_refused(tmp_path, rows, reason):
    (tmp_path / "meta.mat").write_bytes(_meta([(number, wnid, "a", 0) for number, wnid in rows]))
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n")
    with pytest.raises(UserError, match=rf"meta\.mat of .* cannot be read \({reason}.*: download the devkit again"):
        validation_labels(tmp_path / "ILSVRC2012_validation_ground_truth.txt")


def test_flat_tar_with_labels_in_several_forms(listed, tmp_path, validation):
    labels = tmp_path / "labels.txt"
    by_name = "\n".join(f"{name} {label}" for name, label in zip(VALIDATION, (2, 0, 0, 1), strict=True))
    reversed_lines = "\n".join(reversed(by_name.splitlines()))
    for text in (
        "2\n0\n0\n1\n",
        "cat\nant\nant\nbee\n",
        "\ufeffcat\nant\nant\nbee\n",
        by_name,
        reversed_lines,
        reversed_lines.replace(" ", ","),
    ):
        labels.write_text(text)
        rows = listed(validation, labels=str(labels), classes=["ant", "bee", "cat"])
        assert [(name, label) for name, (label,), _, _ in rows] == list(
            zip(VALIDATION, ("cat", "ant", "ant", "bee"), strict=True)
        )


def test_ground_truth_beside_meta_mat(listed, tmp_path, validation):
    truth = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("3\n1\n1\n2\n")
    with pytest.raises(UserError, match=r"numbers the classes as the devkit's meta\.mat says"):
        listed(validation, labels=str(truth))
    (tmp_path / "meta.mat").write_bytes(_meta())
    assert [row[1] for row in listed(validation, labels=str(truth))] == [["n002"], ["n003"], ["n003"], ["n001"]]
    truth.write_text("3\n1\n1\n7\n")
    with pytest.raises(UserError, match=r"has the label 7, which meta\.mat does not know"):
        listed(validation, labels=str(truth))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "holds images without labels: name the file of their labels with --labels"),
        ("0\n1\n", "has 2 labels for the 4 images"),
        ("0\n1\n2\n3\n", "has the label '3', which is neither one of the 3 class names nor an index"),
        ("a.JPEG 1\nb.JPEG 1\nc.JPEG 1\nd.JPEG 1\n", "has no label for ILSVRC2012_val_00000001.JPEG"),
    ],
)
def test_labels_that_do_not_match(listed, tmp_path, validation, labels, message):
    path = tmp_path / "labels.txt"
    path.write_text(labels or "")
    with pytest.raises(UserError, match=message):
        listed(validation, labels=str(path) if labels else None, classes=["ant", "bee", "cat"])
    with pytest.raises(UserError, match=r"file of labels .*none\.txt cannot be read"):
        listed(validation, labels=str(tmp_path / "none.txt"))


def test_eval_split_from_another_source(context, tmp_path, class_tars, validation):
    (tmp_path / "train.tar").write_bytes(_tar([(f"{wnid}.tar", content) for wnid, content in class_tars.items()]))
    (tmp_path / "val.txt").write_text("2\n0\nn002\n1\n")
    listing = list_with_eval(str(tmp_path / "train.tar"), None, str(validation), str(tmp_path / "val.txt"), context)
    rows = _rows(listing)
    assert [row[2] for row in rows] == [False] * 6 + [True] * 4
    assert [row[1] for row in rows[6:]] == [["n003"], ["n001"], ["n002"], ["n002"]]


# --- CIFAR


def _old_pickle(content: dict) -> bytes:
    """As CIFAR's files are: protocol 2, strings as bytes, NumPy's functions under their old module name."""
    text = pickle.dumps(content, protocol=2)
    return text.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


@pytest.fixture
def cifar(tmp_path) -> tuple[Path, np.ndarray]:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    for number, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        part = pixels[2 * number : 2 * number + 2].reshape(2, 3072)
        (folder / name).write_bytes(_old_pickle({b"data": part, b"labels": [number, 1], b"batch_label": b"x"}))
    (folder / "batches.meta").write_bytes(_old_pickle({b"label_names": [b"ant", b"bee", b"cat"]}))
    return folder, pixels.transpose(0, 2, 3, 1)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_10(listed, tmp_path, cifar, packed):
    source, pixels = cifar
    if packed:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
            tar.add(source, arcname=source.name)
        source = tmp_path / "cifar-10-python.tar.gz"
    assert recognise(str(source)) == "cifar"
    rows = listed(source)
    assert [row[1:3] for row in rows] == [
        *[([label], False) for label in ("ant", "bee", "bee", "bee")],
        (["cat"], True),
        (["bee"], True),
    ]
    assert all(np.array_equal(decode_image(row[3]), image) for row, image in zip(rows, pixels, strict=True))


def test_cifar_100_has_fine_labels(listed, tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    data = np.zeros((2, 3072), np.uint8)
    for name in ("train", "test"):
        batch = {b"data": data, b"fine_labels": [1, 0], b"coarse_labels": [0, 0]}
        (folder / name).write_bytes(_old_pickle(batch))
    (folder / "meta").write_bytes(_old_pickle({b"fine_label_names": [b"a", b"b"], b"coarse_label_names": [b"c"]}))
    assert [row[1:3] for row in listed(folder)] == [(["b"], False), (["a"], False), (["b"], True), (["a"], True)]


def test_pickles_that_would_run_something_do_not(listed, cifar, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    source, _ = cifar
    (source / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil()}, protocol=2))
    with pytest.raises(UserError, match=r"data_batch_1 of .* is not one of CIFAR's pickles \(it asks for "):
        listed(source)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "has 1 labels for 2 images"),
        ({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 0]}, "no uint8 array of 3,072 columns"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 3]}, "has the label '3'"),
        ([1, 2], "it is no dictionary"),
    ],
)
def test_damaged_cifar(listed, cifar, batch, message):
    source, _ = cifar
    (source / "data_batch_2").write_bytes(_old_pickle(batch))
    with pytest.raises(UserError, match=message):
        listed(source)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "opcodes",
    [
        b"}r\xff\xff\xff\x7f",  # a memo under the number 2**31
        b"\x96" + struct.pack("<Q", 1 << 40),  # an array of 1 TB
        b"cnumpy\nndarray\n(\x8a\x05\0\0\0\0\x01tR",  # the same, by a call
        b"c_codecs\nencode\n(C\x01xU\x03hextR",
        b"}(K\x01" + b"\x86".join([b"q\x00h\x00"] * 60) + b"K\x01u",  # tuples of tuples as a key
        b"",
        b"}" * 100,
        b"]",
    ],
)
def test_pickles_that_would_take_all_memory_or_time_do_not(listed, cifar, opcodes):
    source, _ = cifar
    (source / "data_batch_1").write_bytes(b"\x80\x02" + opcodes + b".")
    with pytest.raises(UserError, match=r"data_batch_1 of .*: download it again") as error:
        listed(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("meta", [{b"label_names": [7]}, {b"label_names": 7}, {b"label_names": [b"\xff"]}])
def test_cifar_class_names_that_are_no_text(listed, cifar, meta):
    source, _ = cifar
    (source / "batches.meta").write_bytes(_old_pickle(meta))
    with pytest.raises(UserError, match="batches.meta of .* has class names that are no text"):
        listed(source)


@pytest.mark.timeout(60)
def test_archives_of_cifar_with_a_negative_size_end(listed, tmp_path):
    """With which tarfile goes back, and round and round."""
    path = tmp_path / "cifar-10-python.tar"
    path.write_bytes(header(b"c/data_batch_1", b"-0000001000") + END)
    with pytest.raises(UserError, match="is damaged or unreadable .*it has a damaged header at byte 0"):
        list_cifar(path, None)
    devkit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    devkit.write_bytes(gzip.compress(header(b"d/data/meta.mat", b"-0000001000") + END))
    with pytest.raises(UserError, match="the devkit .* cannot be read .*it has a damaged header at byte 0"):
        validation_labels(devkit)


# --- MNIST and its kin


def _idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path) -> tuple[Path, np.ndarray]:
    folder = tmp_path / "mnist"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for name, part, labels in (("train", pixels[:3], (7, 0, 2)), ("t10k", pixels[3:], (1, 7))):
        images, digits = _idx(part), _idx(np.array(labels, np.uint8))
        if name == "train":
            (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
            (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(digits))
        else:
            (folder / "t10k-images-idx3-ubyte").write_bytes(images)
            (folder / "t10k-labels-idx1-ubyte").write_bytes(digits)
    return folder, pixels


def test_idx(listed, mnist):
    source, pixels = mnist
    rows = listed(source)
    assert [row[1:3] for row in rows] == [(["7"], False), (["0"], False), (["2"], False), (["1"], True), (["7"], True)]
    for row, image in zip(rows, pixels, strict=True):
        assert np.array_equal(decode_image(row[3]), np.repeat(image[:, :, None], 3, axis=2))
    assert rows[0][3][:4] == b"\x89PNG"


def test_damaged_idx(listed, mnist):
    source, _ = mnist
    labels = source / "t10k-labels-idx1-ubyte"
    for content, message in (
        (_idx(np.zeros(3, np.uint8)), "has 3 labels for the 2 images"),
        (_idx(np.zeros(2, np.uint8))[:-1], r"has 1 bytes of data where \(2,\) are announced"),
        (b"<html>", "is not an idx file of 1-dimensional bytes"),
        (b"\0\0\x08\x01\xff\xff\xff\xff12", r"has 2 bytes of data where \(4294967295,\) are announced"),
        (_idx(np.zeros(2, np.uint8)) + b"1", r"has more than 2 bytes of data where \(2,\) are announced"),
    ):
        labels.write_bytes(content)
        with pytest.raises(UserError, match=message):
            listed(source)
    labels.unlink()
    with pytest.raises(UserError, match="has no file of labels t10k-labels-idx1-ubyte"):
        listed(source)
    images = source / "train-images-idx3-ubyte.gz"
    good = gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12 + bytes(1000))
    for content, message in (
        (good, r"announces \(4294967295, 4294967295, 4294967295\), which are more than 8,589,934,592 bytes"),
        (gzip.compress(_idx(np.zeros((3, 28, 28), np.uint8)) + bytes(1 << 26)), "has more than 2,352 bytes of data"),
        (good[:-10], "announces|cannot be read"),
        (good[:10] + b"\xff" * 9 + good[19:], "cannot be read"),  # zlib's own error
    ):
        images.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(UserError, match=message):
            listed(source)
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
        tracemalloc.stop()


# --- Parquet


def _parquet(path: Path, rows: list[dict], features: dict | None, groups: int = 2) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(rows)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=groups)


CLASS_LABEL = {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}


def _image_rows(photo, labels: list, first: int = 0, column: str = "label") -> list[dict]:
    return [
        {"image": {"bytes": photo(first + n), "path": f"{first + n}.jpg"}, column: label}
        for n, label in enumerate(labels)
    ]


def test_parquet_of_hugging_face(listed, context, tmp_path, photo):
    features = {"image": {"_type": "Image"}, "label": CLASS_LABEL}
    data = tmp_path / "in" / "data"
    _parquet(data / "train-00000-of-00002.parquet", _image_rows(photo, [2, 0, 1]), features)
    _parquet(data / "train-00001-of-00002.parquet", _image_rows(photo, [1], 3), features)
    _parquet(data / "validation-00000-of-00001.parquet", _image_rows(photo, [0, 2], 10), features)
    _parquet(data / "test-00000-of-00001.parquet", _image_rows(photo, [-1], 20), features)  # labels kept secret
    rows = listed(tmp_path / "in")
    assert [row[1:] for row in rows] == [
        (["cat"], False, photo(0)),
        (["ant"], False, photo(1)),
        (["bee"], False, photo(2)),
        (["bee"], False, photo(3)),
        (["ant"], True, photo(10)),
        (["cat"], True, photo(11)),
    ]
    assert "1 named val (eval)" in context.descriptions[0]
    left_out = list_source(str(tmp_path / "in"), None, context).left_out
    assert left_out == {"Parquet file named test (there is a validation split)": 1}


def test_parquet_of_which_some_files_say_a_split(listed, tmp_path, photo):
    features = {"image": {"_type": "Image"}, "label": CLASS_LABEL}
    for number, name in enumerate(("train-0", "extra-0", "test-0")):
        _parquet(tmp_path / "in" / f"{name}.parquet", _image_rows(photo, [number], number), features)
    with pytest.raises(
        UserError, match="some Parquet files in .* are named by a split, and others, such as extra-0"
    ) as e:
        listed(tmp_path / "in")
    first, second = (shlex.split(command) for command in re.findall("`(fastvit [^`]+)`", str(e.value)))
    assert first[3:6] == [f"{tmp_path}/in/train-0.parquet", "--eval-source", f"{tmp_path}/in/test-0.parquet"]
    assert [row[1:3] for row in listed(first[3])] == [(["ant"], False)]
    assert [row[1:3] for row in listed(second[3])] == [(["bee"], False), (["ant"], False)]  # in sorted order
    assert [row[1:3] for row in listed(f"{tmp_path}/in/t*.parquet")] == [(["ant"], False), (["cat"], True)]


def test_parquet_in_a_folder_for_each_split(listed, tmp_path, photo):
    features = {"image": {"_type": "Image"}, "label": CLASS_LABEL}
    for number, name in enumerate(("test", "train", "validation")):
        _parquet(tmp_path / "in" / name / "0000.parquet", _image_rows(photo, [number], number), features)
    with pytest.raises(
        UserError, match=r"Parquet files of .* are in folders, such as test/: name all as '.*/\*/\*.par"
    ):
        listed(tmp_path / "in")
    rows = listed(f"{tmp_path}/in/*/*.parquet")
    assert [row[1:] for row in rows] == [(["bee"], False, photo(1)), (["cat"], True, photo(2))]


@pytest.mark.parametrize(
    "feature",
    [
        {"feature": CLASS_LABEL, "_type": "Sequence"},
        {"feature": CLASS_LABEL, "_type": "List"},
        [CLASS_LABEL],
    ],
)
def test_parquet_with_several_labels(context, tmp_path, photo, feature):
    rows = _image_rows(photo, [[0, 2], [1], []], column="tags")
    _parquet(tmp_path / "all.parquet", rows, {"image": {"_type": "Image"}, "tags": feature})
    listing = list_source(str(tmp_path / "all.parquet"), None, context)
    assert listing.classes == ["ant", "bee", "cat"] and listing.multi_label
    assert [listing.labels_of(n) for n in range(3)] == [[0, 2], [1], []]


def test_parquet_without_metadata(listed, tmp_path, photo):
    rows = [{"img": photo(n), "species": name} for n, name in enumerate(("wolf", "fox"))]
    _parquet(tmp_path / "all.parquet", rows, None)
    with pytest.raises(UserError, match="has no column of labels, only img, species: name it with --label-column"):
        listed(tmp_path / "all.parquet")
    found = listed(tmp_path / "all.parquet", labels="species")
    assert [row[1:] for row in found] == [(["wolf"], False, photo(0)), (["fox"], False, photo(1))]


def test_parquet_that_cannot_serve(listed, tmp_path, photo, monkeypatch):
    path = tmp_path / "all.parquet"
    _parquet(path, [{"image": {"bytes": None, "path": "a.jpg"}, "label": 0}], None)
    with pytest.raises(UserError, match="every row of .* has no image bytes in 'image': embed the images"):
        listed(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        listed(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"need pyarrow: pip install 'fastvit-engine\[parquet\]'"):
        listed(path)


# --- lists


SPLIT_ROWS = [
    ("0.jpg", "fox", "train"),
    ("1.jpg", "ant", "Test"),
    ("2.jpg", "ant", "validation"),
    ("3.jpg", "ant", "train"),
]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "tar"])
def test_a_column_of_splits_is_heeded(tmp_path, context, photo, form):
    path = _table_of(tmp_path, form, SPLIT_ROWS, photo)
    listing = list_source(str(path), None, context)
    assert [(listing.classes[listing.labels_of(n)[0]], bool(listing.held_out[n])) for n in range(len(listing))] == [
        ("fox", False),
        ("ant", True),
        ("ant", False),
    ]
    assert listing.left_out == {"row of the test split (there is a validation split)": 1}
    assert "split" in context.descriptions[0]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "tar"])
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["train", "5", "val", "train"], "the column 'split' of .* has '5', and splits are called train, val and test"),
        (["val", "test", "val", "test"], "says val and test, and never train: write the rows to train on"),
        (["", "", "", ""], "the column 'split' of .* is empty"),
    ],
)
def test_a_column_of_splits_that_cannot_be_read_is_refused(tmp_path, context, photo, form, parts, message):
    rows = [(name, label, part) for (name, label, _), part in zip(SPLIT_ROWS, parts, strict=True)]
    with pytest.raises(UserError, match=message):
        list_source(str(_table_of(tmp_path, form, rows, photo)), None, context)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "tar"])
def test_rows_of_one_split_are_all_taken_and_one_without_is_faulty(tmp_path, context, photo, form):
    rows = [(name, label, "" if name == "2.jpg" else "test") for name, label, _ in SPLIT_ROWS]
    listing = list_source(str(_table_of(tmp_path, form, rows, photo)), None, context)
    assert len(listing) == 4 and not listing.held_out.any()
    assert [listing.files[listing.file[n]].fault for n in range(4)] == ["", "", "has no split", ""]


def test_the_names_of_parquet_files_and_a_column_of_splits_must_agree(tmp_path, context, photo):
    for name, part in (("train.parquet", "train"), ("val.parquet", "train")):
        rows = [{"image": photo(n), "label": n % 2, "split": part} for n in range(2)]
        _parquet(tmp_path / "in" / name, rows, None)
    with pytest.raises(UserError, match=r"rows of the split 'train', by the column 'split', in the file val\.parquet"):
        list_source(str(tmp_path / "in"), None, context)


def test_the_names_of_shards_and_a_field_of_splits_must_agree(tmp_path, context, photo):
    (tmp_path / "in").mkdir()
    for name, part in (("train.tar", "train"), ("val.tar", "train")):
        members = [("0.jpg", photo(0)), ("0.json", json.dumps({"label": 0, "split": part}).encode())]
        (tmp_path / "in" / name).write_bytes(_tar(members))
    with pytest.raises(UserError, match=r"samples of the split 'train', by the field 'split' of json, in"):
        list_source(str(tmp_path / "in"), "webdataset", context)


def _table_of(folder: Path, form: str, rows: list[tuple[str, str, str]], photo) -> Path:
    path = folder / f"list.{form}"
    if form == "parquet":
        _parquet(path, [{"image": photo(n), "label": row[1], "split": row[2]} for n, row in enumerate(rows)], None)
        return path
    if form == "tar":
        members = []
        for number, (name, label, split) in enumerate(rows):
            fields = json.dumps({"label": label, "split": split}).encode()
            members += [(name, photo(number)), (name.replace("jpg", "json"), fields)]
        path.write_bytes(_tar(members))
        return path
    for number, (name, _, _) in enumerate(rows):
        (folder / name).write_bytes(photo(number))
    if form == "jsonl":
        path.write_text("\n".join(json.dumps(dict(zip(("path", "label", "split"), row, strict=True))) for row in rows))
    else:
        path.write_text("\n".join(",".join(row) for row in [("path", "label", "split"), *rows]) + "\n")
    return path


def test_csv_and_jsonl(listed, tmp_path, photo):
    for number in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{number}.jpg").write_bytes(photo(number))
    lines = [(f"images/{n}.jpg", label) for n, label in enumerate(("fox", "ant, red", "fox"))]
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *lines])
    (tmp_path / "list.tsv").write_text("label\tfilename\n" + "".join(f"{label}\t{name}\n" for name, label in lines))
    rows = [json.dumps({"image": str(tmp_path / name), "class": label}) for name, label in lines]
    (tmp_path / "list.jsonl").write_text("\n".join(rows) + "\n\n")
    for name in ("list.csv", "list.tsv", "list.jsonl"):
        found = listed(tmp_path / name)
        assert [row[1:] for row in found] == [
            (["fox"], False, photo(0)),
            (["ant, red"], False, photo(1)),
            (["fox"], False, photo(2)),
        ]


def test_an_image_that_a_list_names_twice_is_taken_once_and_counted(context, tmp_path):
    rows = ["a.jpg,fox", "b.jpg,ant", "./a.jpg,fox", "https://x.example/a.jpg,ant", "d/../b.jpg,ant", "c.jpg,"]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows, "https://x.example/a.jpg,ant"]) + "\n")
    listing = list_source(str(tmp_path / "list.csv"), None, context)
    assert [listing.name(n) for n in range(4)] == ["a.jpg", "b.jpg", "https://x.example/a.jpg", "line 7"]
    assert [listing.labels_of(n) for n in range(4)] == [[1], [0], [0], []]
    assert len(listing) == 4 and listing.left_out == {"row that repeats an image": 3}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ["a.jpg,fox,train", "a.jpg,ant,train"],
            r"a.jpg twice, with the labels \['fox'\] and \['ant'\]: list an image",
        ),
        (["a.jpg,fox,train", "./a.jpg,fox,val"], r"./a.jpg in both splits: remove it from one"),
    ],
)
def test_a_list_that_contradicts_itself_is_refused(context, tmp_path, rows, message):
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows, "b.jpg,ant,train"]) + "\n")
    with pytest.raises(UserError, match=message):
        list_source(str(tmp_path / "list.csv"), None, context)


@pytest.mark.parametrize(
    ("text", "classes", "expected"),
    [
        ("path,label\na,3\nb,0\n", ["0", "1", "2", "3"], [[3], [0]]),
        ("path,labels\na,fox;ant\nb,ant\nc,[]\n", ["ant", "fox"], [[1, 0], [0], []]),
        ('path,labels\na,"[2, 0]"\nb,1\n', ["0", "1", "2"], [[2, 0], [1]]),
    ],
)
def test_labels_by_index_and_by_name(context, tmp_path, text, classes, expected):
    (tmp_path / "list.csv").write_text(text)
    listing = list_source(str(tmp_path / "list.csv"), None, context)
    assert listing.classes == classes and listing.multi_label == any(len(labels) != 1 for labels in expected)
    assert [listing.labels_of(n) for n in range(len(expected))] == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "name,label\nx,1\n",
            r"a\.csv has no column of images, only name, label: name it with --image-column",
        ),
        ("a.csv", "path,kind\nx,1\n", r"a\.csv has no column of labels, only path, kind: name it with --label-column"),
        ("a.csv", "path;kind\nx;1\n", r"a\.csv has no column of labels, only path, kind"),
        (
            "a.csv",
            f"{'x' * 9000},{'y,' * 90}\n1,2\n",
            r"no column of images, only x{60}\.\.\., (y, )+y and 51 more: name",
        ),
        ("a.csv", "path,label\n", "holds no image"),
        ("a.csv", "\n\n", r"a\.csv is empty: begin it with a line of column names"),
        ("a.csv", "path,label,url\nx,1,y\n", "choose with --image-column path or --image-column url"),
        ("a.csv", "path,class,label\nx,1,y\n", "choose with --label-column class or --label-column label"),
        ("a.csv", "path,path,label\nx,y,1\n", "rename all but one of those called 'path'"),
        ("a.csv", "path,label\nx,caf\xe9\n".encode("latin-1"), "cannot be read .*: save it as UTF-8 text"),
        ("a.jsonl", '{"path": "x", "tag": 1}\n', "has no column of labels, only path, tag"),
        ("a.jsonl", "[1]\nx\n", "has no JSON object in its first lines"),
        ("a.csv", 'path,label\nx,a\ny,"a\nz,b\n', r"cannot be read from line 3 on .* double those in it"),
        ("a.csv", 'path,label\nx,"a\ny,"b"\n', r"cannot be read from line 2 on .* double those in it"),
    ],
)
def test_lists_that_cannot_serve(listed, tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        listed(tmp_path / name)


@pytest.mark.parametrize("name", ["LIST.CSV", "List.Csv", "LIST.JSONL"])
def test_lists_with_an_upper_case_suffix(context, tmp_path, name):
    rows = '{"path": "a.jpg", "label": 1}\n' if "J" in name else "path,label\na.jpg,1\n"
    (tmp_path / name).write_text(rows)
    assert _of(list_source(str(tmp_path / name), None, context)) == [("a.jpg", ["1"])]


@pytest.mark.parametrize("name", ["photos.zip", "PHOTOS.ZIP", "photos.7z"])
def test_archives_that_are_not_read_are_to_be_unpacked(context, tmp_path, name):
    if name.endswith("7z"):
        (tmp_path / name).write_bytes(b"7z")
    else:
        zipfile.ZipFile(tmp_path / name, "w").close()
    with pytest.raises(UserError, match=rf"{name} is an? (zip )?archive, .* not read .*: unpack it.* name the folder"):
        list_source(str(tmp_path / name), None, context)


def test_a_line_break_in_a_field_is_a_fault_of_its_row(context, tmp_path):
    (tmp_path / "a.csv").write_text('"path";"label"\n"a.jpg";"ant\nb.jpg;bee"\n"c.jpg";"a ""b"" c"\n')
    assert _of(list_source(str(tmp_path / "a.csv"), None, context)) == [
        ("line 3", "has a line break in its path or label"),
        ("c.jpg", ['a "b" c']),
    ]


def test_the_first_object_may_lack_a_column(context, tmp_path):
    rows = [{"path": "a.jpg"}, {"path": "b.jpg", "label": 1}, {"label": 0, "path": "c.jpg"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert _of(list_source(str(tmp_path / "a.jsonl"), None, context)) == [
        ("line 1", "has no label"),
        ("b.jpg", ["1"]),
        ("c.jpg", ["0"]),
    ]


def test_labels_of_the_eval_split_are_those_of_the_training_images(context, tmp_path):
    path, rows = tmp_path / "a.csv", ["x,0,train", "y,1,train", "z,ant,val", "w,1,val"]
    path.write_text("\n".join(["path,label,split", *rows]))
    with pytest.raises(UserError, match=r"has the label 'ant' among the images to evaluate on, .* as --classes"):
        list_source(str(path), None, context)
    context.classes = ["bee", "ant"]  # what the sentence proposes
    assert [labels for _, labels in _of(list_source(str(path), None, context))] == [["bee"], ["ant"], ["ant"], ["ant"]]
    context.classes = None
    path.write_text("path,label,split\nx,ant;bee,train\ny,ant;rare,val\n")
    assert list_source(str(path), None, context).classes == ["ant", "bee", "rare"]
    path.write_text("path,label,split\nx,ant;bee,train\ny,0;1,val\n")
    with pytest.raises(UserError, match="has the label '0' among the images to evaluate on"):
        list_source(str(path), None, context)


def _of(listing: Listing) -> list[tuple[str, list[str] | str]]:
    """Of each image its name and the names of its classes, or why it is faulty."""
    return [
        (
            listing.name(index),
            listing.files[listing.file[index]].fault or [listing.classes[n] for n in listing.labels_of(index)],
        )
        for index in range(len(listing))
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_delimiters_and_encodings_of_lists(context, tmp_path, delimiter, suffix, encoding):
    lines = [("Path ", "note", "LABEL"), ("a;b,c.jpg", 'say "hi"', "bär"), ("d\te.jpg", "", "ant; bär")]
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter).writerows(lines)
    (tmp_path / f"list.{suffix}").write_bytes(buffer.getvalue().encode(encoding))
    listing = list_source(str(tmp_path / f"list.{suffix}"), None, context)
    assert _of(listing) == [("a;b,c.jpg", ["bär"]), ("d\te.jpg", ["ant", "bär"])]


def test_the_index_that_pandas_writes_is_no_column_of_ours(context, tmp_path):
    (tmp_path / "list.csv").write_text(",path,label\n0,a.jpg,3\n1,b.jpg,0\n")
    listing = list_source(str(tmp_path / "list.csv"), None, context)
    assert _of(listing) == [("a.jpg", ["3"]), ("b.jpg", ["0"])]
    (tmp_path / "list.csv").write_text(",path\n0,a.jpg\n1,b.jpg\n")
    with pytest.raises(UserError, match=r"has no column of labels, only path: name it with --label-column"):
        list_source(str(tmp_path / "list.csv"), None, context)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_columns_are_chosen_by_name(context, tmp_path, photo, suffix):
    path = tmp_path / f"list.{suffix}"
    rows = [
        {"path": "x", "image": "a.jpg", "label": 7, "kind": "cat"},
        {"path": "y", "image": "b.jpg", "label": 8, "kind": "ant"},
    ]
    if suffix == "csv":
        path.write_text("\n".join(",".join(map(str, row)) for row in [rows[0], *(row.values() for row in rows)]))
    elif suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        _parquet(
            path, [row | {"path": photo(1), "image": {"bytes": photo(2), "path": row["image"]}} for row in rows], None
        )
    context.image_column, context.label_column = "image", "kind"
    listing = list_source(str(path), None, context)
    assert [labels for _, labels in _of(listing)] == [["cat"], ["ant"]]
    assert [name.rpartition("/")[2] for name, _ in _of(listing)] == ["a.jpg", "b.jpg"]
    context.label_column = "none"
    with pytest.raises(UserError, match="has no column called 'none', only path, image, label, kind"):
        list_source(str(path), None, context)


def test_lines_that_cannot_be_used_are_faulty_and_the_others_are_kept(context, tmp_path):
    text = "path,label\na,1\nb,\n,1\nc,nan\nd,0,5\n\ne,0,\nf,None\ng\nh,[1;2]\n\"i\",\"['a' 'b']\"\nj,2\n"
    (tmp_path / "list.csv").write_text(text)
    assert _of(list_source(str(tmp_path / "list.csv"), None, context)) == [
        ("a", ["1"]),
        ("line 3", "has no label"),
        ("line 4", "has no path or URL of an image"),
        ("line 5", "has no label"),
        ("line 6", "has 3 fields, but the header has 2"),
        ("e", ["0"]),
        ("line 9", "has no label"),
        ("line 10", "has no label"),
        ("line 11", "has a list of labels that is neither JSON nor Python"),
        ("line 12", "has a list of labels that is neither JSON nor Python"),
        ("j", ["2"]),
    ]
    rows = ['{"path": "a", "label": "x"}', "{", "[1]", "[" * 100_000, '{"path": "b"}', '{"path": 5, "label": "y"}']
    rows += ['{"path": "c", "label": null}', '{"path": "c", "label": NaN}', '{"path": "c", "label": {"a": 1}}']
    rows += ['{"path": "c", "label": ["x", null]}', '{"path": "d", "label": ["x", "y"]}']
    (tmp_path / "list.jsonl").write_text("\n".join(rows))
    assert _of(list_source(str(tmp_path / "list.jsonl"), None, context)) == [
        ("a", ["x"]),
        ("line 2", "is not JSON"),
        ("line 3", "is not a JSON object"),
        ("line 4", "is not JSON"),
        ("line 5", "has no label"),
        ("line 6", "has no path or URL of an image"),
        ("line 7", "has no label"),
        ("line 8", "has no label"),
        ("line 9", "has a label of type dict, which is neither a class index nor a name"),
        ("line 10", "has no label"),
        ("d", ["x", "y"]),
    ]


def test_rows_of_parquet_that_cannot_be_used(context, tmp_path, photo):
    path = tmp_path / "all.parquet"
    rows = _image_rows(photo, [2.0, None, 1.0, 0.0, float("nan")])
    rows[2]["image"]["bytes"] = None
    rows.append({"image": None, "label": 0.0})
    _parquet(path, rows, None)
    listing = list_source(str(path), None, context)
    assert _of(listing) == [
        ("all/0.jpg", ["2"]),
        ("row 1", "has no label"),
        ("row 2", "has no image bytes in 'image'"),
        ("all/3.jpg", ["0"]),
        ("row 4", "has no label"),
        ("row 5", "has no image bytes in 'image'"),
    ]
    assert SourceReader(listing).where(1) == f"row 1 in {path}" and SourceReader(listing).read(3).image == photo(3)


@pytest.mark.parametrize("kind", ["dictionary", "int8", "decimal", "binary", "bool"])
def test_arrow_types_of_labels(context, tmp_path, photo, kind):
    pyarrow = pytest.importorskip("pyarrow")
    columns = {
        "dictionary": (pyarrow.array(["fox", "ant", "fox"]).dictionary_encode(), ["fox", "ant", "fox"]),
        "int8": (pyarrow.array([2, 0, 2], pyarrow.int8()), ["2", "0", "2"]),
        "decimal": (pyarrow.array([2, 0, 2], pyarrow.decimal128(4, 1)), ["2", "0", "2"]),
        "binary": (pyarrow.array([b"fox", b"ant", b"fox"]), ["fox", "ant", "fox"]),
        "bool": (pyarrow.array([True, False, True]), ["True", "False", "True"]),
    }
    labels, expected = columns[kind]
    table = pyarrow.table({"image": [photo(n) for n in range(3)], "label": labels})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "all.parquet")
    listing = list_source(str(tmp_path / "all.parquet"), None, context)
    assert [names for _, (names,) in _of(listing)] == expected
    assert listing.classes == (["0", "1", "2"] if "2" in expected else sorted(set(expected)))


def test_two_class_labels_in_parquet_must_be_chosen(context, tmp_path, photo):
    rows = [{"img": photo(n), "fine_label": n, "coarse_label": 0} for n in range(3)]
    coarse = {"names": ["beast"], "_type": "ClassLabel"}
    _parquet(tmp_path / "a.parquet", rows, {"fine_label": CLASS_LABEL, "coarse_label": coarse})
    with pytest.raises(UserError, match="choose with --label-column fine_label or --label-column coarse_label"):
        list_source(str(tmp_path / "a.parquet"), None, context)
    context.label_column = "coarse_label"
    assert list_source(str(tmp_path / "a.parquet"), None, context).classes == ["beast"]


# --- two sources of labels


def test_numbers_that_name_folders_and_numbers_that_are_indices_are_refused(context, tmp_path, photo):
    _files(tmp_path / "a", tuple(f"{n}/x.jpg" for n in range(1, 12)), photo)
    (tmp_path / "from-0.csv").write_text("path,label\n" + "".join(f"{n}.jpg,{n}\n" for n in range(11)))
    (tmp_path / "some.csv").write_text("path,label\n1.jpg,1\n2.jpg,2\n")
    for name in ("from-0.csv", "some.csv"):
        with pytest.raises(UserError, match="class 0 is called '1', so that 1 could be an index or a name: number the"):
            list_with_eval(str(tmp_path / "a"), None, str(tmp_path / name), None, context)
    (tmp_path / "same.csv").write_text("path,label\n" + "".join(f"{n}.jpg,{n}.0\n" for n in range(1, 12)))
    listing = list_with_eval(str(tmp_path / "a"), None, str(tmp_path / "same.csv"), None, context)
    assert listing.classes == [str(n) for n in range(1, 12)] and listing.order == "numeric"
    by_text = [int(n) - 1 for n in sorted(listing.classes)]  # the order of the folders
    assert listing.first_labels().tolist() == [*by_text, *range(11)]
    _files(tmp_path / "b", tuple(f"{n}/x.jpg" for n in range(11)), photo)
    listing = list_with_eval(str(tmp_path / "b"), None, str(tmp_path / "from-0.csv"), None, context)
    assert listing.first_labels().tolist() == [*(int(n) for n in sorted(listing.classes)), *range(11)]


def test_folders_that_are_numbers_are_names_of_given_classes_only_if_all_are_there(context, tmp_path, photo):
    _files(tmp_path / "in", ("0/a.jpg", "1/a.jpg", "2/a.jpg"), photo)
    context.classes = ["ant", "bee", "cow"]
    assert list_source(str(tmp_path / "in"), None, context).labels.tolist() == [0, 1, 2]
    context.classes = ["ant", "bee", "cow", "dog"]
    with pytest.raises(UserError, match="has the label '0', which is not one of the 4 class names"):
        list_source(str(tmp_path / "in"), None, context)


def test_several_labels_reach_the_shards(tmp_path, photo):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(photo(number))
    (tmp_path / "list.csv").write_text("path,labels\n0.jpg,fox;ant\n1.jpg,ant\n2.jpg,bee;fox;ant\n3.jpg,[]\n")
    out = tmp_path / "out"
    made = make_dataset(str(tmp_path / "list.csv"), out, eval_fraction=0, workers=1, progress=lambda line: None)
    assert made.info.classes == ["ant", "bee", "fox"]
    found = {s["__key__"]: s for s in read_shard(str(out / "train-000000.tar"))}
    assert {key: (s.get("cls"), json.loads(s["json"])) for key, s in found.items()} == {
        "00000000_0": (b"2", {"labels": [2, 0]}),
        "00000001_1": (b"0", {"labels": [0]}),
        "00000002_2": (b"1", {"labels": [1, 2, 0]}),
        "00000003_3": (None, {"labels": []}),
    }


# --- URLs


@pytest.fixture
def server(photo) -> Iterator[tuple[str, dict[str, int]]]:
    """An HTTP server, and how often each path was asked for: /N.jpg is a photo, others fail in their ways."""
    asked: dict[str, int] = {}
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with lock:
                asked[self.path] = times = asked.get(self.path, 0) + 1
            name = self.path.strip("/").partition("?")[0]
            if name == "gone.jpg":
                self.send_error(404)
            elif name == "down.jpg" or (name == "flaky.jpg" and times < 3):
                self.send_error(503)
            elif name == "cut.jpg":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"x" * 10)
            elif name == "slow.jpg":
                stop.wait(5)
            else:
                body = photo(7 if name == "flaky.jpg" else int(name.removesuffix(".jpg")))
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *arguments) -> None:
            pass

    stop = threading.Event()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", asked
    stop.set()
    http.shutdown()
    thread.join()
    http.server_close()


def test_download_retries_what_may_pass(server, photo, monkeypatch):
    monkeypatch.setattr(reading, "_RETRY_WAITS", (0.0, 0.0, 0.0))
    url, asked = server
    assert reading.download(f"{url}/flaky.jpg", 5) == photo(7) and asked["/flaky.jpg"] == 3
    for name, message, times in (
        ("gone.jpg", "HTTP 404", 1),
        ("down.jpg", "HTTP 503", 4),
        ("cut.jpg", "IncompleteRead", 4),
        ("slow.jpg", "timed out", 4),
    ):
        with pytest.raises(OSError, match=message):
            reading.download(f"{url}/{name}", 0.1 if name == "slow.jpg" else 5)
        assert asked[f"/{name}"] == times
    with pytest.raises(OSError):
        reading.download("http://127.0.0.1:9/none.jpg", 5)


def test_list_of_urls_end_to_end(server, tmp_path, photo, monkeypatch):
    monkeypatch.setattr(reading, "_RETRY_WAITS", (0.0, 0.0, 0.0))
    url, _ = server
    (tmp_path / "local.jpg").write_bytes(photo(99))
    names = [f"{url}/{n}.jpg?size=large.x" for n in range(30)] + [f"{url}/gone.jpg", f"{url}/flaky.jpg", "local.jpg"]
    (tmp_path / "list.csv").write_text("url,label\n" + "".join(f"{name},{n % 2}\n" for n, name in enumerate(names)))
    arguments = {"eval_fraction": 0.0, "samples_per_shard": 20, "workers": 2, "progress": lambda line: None}
    made = make_dataset(str(tmp_path / "list.csv"), tmp_path / "out", max_failed=0.05, **arguments)
    assert made.info.train.samples == 32 and made.info.failed == 1
    failed = json.loads((tmp_path / "out" / "failed.jsonl").read_text())
    assert failed == {"image": f"{url}/gone.jpg", "reason": "cannot be read (HTTP 404 Not Found)"}
    found = {s["__key__"]: s for name in made.info.train.shards for s in read_shard(str(tmp_path / "out" / name))}
    by_index = {int(key[:8]): s for key, s in found.items()}
    expected = {n: photo(n) for n in range(30)} | {31: photo(7), 32: photo(99)}
    assert {n: s["jpg"] for n, s in by_index.items()} == expected
    assert all(s["cls"] == str(n % 2).encode() for n, s in by_index.items())
    with pytest.raises(UserError, match=r"gone\.jpg cannot be read \(HTTP 404 Not Found\)"):
        make_dataset(str(tmp_path / "list.csv"), tmp_path / "none", **arguments)
    with pytest.raises(UserError, match="--dedup reads every image twice"):
        make_dataset(str(tmp_path / "list.csv"), tmp_path / "other", dedup=True, **arguments)


def test_secrets_of_urls_are_used_and_appear_nowhere(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(reading, "_RETRY_WAITS", (0.0, 0.0, 0.0))
    url, asked = server
    given = url.replace("://", "://user:p4ss@")
    names = [f"{given}/{n}.jpg?sig=s1gn.{n}" for n in range(30)] + [f"{given}/gone.jpg?sig=s1gn.x"]
    names += [f"{url.replace('://', '://user:p4ss@x:')}/a b.jpg?sig=s1gn"]
    (tmp_path / "list.csv").write_text("url,label\n" + "".join(f"{name},{n % 2}\n" for n, name in enumerate(names)))
    arguments = {"eval_fraction": 0.0, "samples_per_shard": 20, "workers": 2}
    made = make_dataset(str(tmp_path / "list.csv"), tmp_path / "out", max_failed=0.1, **arguments)
    assert made.info.train.samples == 30 and asked["/7.jpg?sig=s1gn.7"] == 1
    for name in ("gone", "bad"):
        with pytest.raises(UserError) as error:
            make_dataset(str(tmp_path / "list.csv"), tmp_path / name, **arguments)
        assert "p4ss" not in str(error.value) and "s1gn" not in str(error.value)
    assert "p4ss" not in "".join(capfd.readouterr())
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or not any(word in path.read_bytes() for word in (b"p4ss", b"s1gn")), path


def test_a_password_is_for_the_server_that_the_url_names():
    request = reading._request("http://me:w%40rd@host/x.jpg?a=b#c")
    assert request.full_url == "http://host/x.jpg?a=b"
    assert request.unredirected_hdrs == {"Authorization": "Basic bWU6d0ByZA=="}  # me:w@rd
    assert request.headers == {"User-agent": "fastvit-engine"}


# --- shards made anew


def test_webdataset_keeps_images_json_and_labels(listed, context, tmp_path, photo, write_tar):
    (tmp_path / "in").mkdir()
    write_tar(
        tmp_path / "in" / "b.tar",
        [("x/s1.jpg", photo(1)), ("x/s1.cls", b"2"), ("x/s1.json", b'{"text": "hi"}'), ("x/s1.txt", b"hi")],
    )
    write_tar(tmp_path / "in" / "c.tar.gz", [("s3.json", b'{"label": "1"}'), ("s3.png", photo(3))])
    assert recognise(str(tmp_path / "in")) == "webdataset"
    assert listed(tmp_path / "in") == [
        ("x/s1", ["2"], False, photo(1)),
        ("s3", ["1"], False, photo(3)),
    ]
    out = tmp_path / "out"
    make_dataset(str(tmp_path / "in"), out, eval_fraction=0, workers=1, progress=lambda line: None)
    found = {s["__key__"]: s for s in read_shard(str(out / "train-000000.tar"))}
    assert set(found) == {"00000000_s1", "00000001_s3"}
    assert found["00000000_s1"]["json"] == b'{"text": "hi"}' and found["00000000_s1"]["cls"] == b"2"
    assert found["00000001_s3"]["jpg"] == photo(3) and found["00000001_s3"]["cls"] == b"1"


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{oops", b"\xff"], ids=["deep", "no JSON", "no text"])
def test_a_json_member_that_cannot_be_read_is_a_failed_image(tmp_path, photo, write_tar, content):
    """The labels are elsewhere, but the list of labels is to be added to that member."""
    members = [("a.jpg", photo(1)), ("a.cls", b"[1, 2]"), ("a.json", content)]
    members += [("b.jpg", photo(2)), ("b.cls", b"[0]"), ("b.json", b'{"text": "hi"}')]
    path = write_tar(tmp_path / "in.tar", members)
    arguments = {"labels": "cls", "eval_fraction": 0, "workers": 1, "progress": lambda line: None}
    with pytest.raises(UserError, match=r"a in .*in.tar has a json member that cannot be read \("):
        make_dataset(str(path), tmp_path / "none", **arguments)
    made = make_dataset(str(path), tmp_path / "out", max_failed=0.5, **arguments)
    (kept,) = read_shard(str(tmp_path / "out" / "train-000000.tar"))
    assert made.info.failed == 1 and json.loads(kept["json"]) == {"text": "hi", "labels": [0]}


def test_what_lies_beside_shards_is_counted(context, tmp_path, photo, write_tar):
    (tmp_path / "in" / "logs").mkdir(parents=True)
    write_tar(tmp_path / "in" / "0.tar", [("a.jpg", photo(1)), ("a.cls", b"0")])
    for name in ("1.tar.part", "README.md", "shards.index", "x.jpg"):
        (tmp_path / "in" / name).write_bytes(b"x")
    assert list_source(str(tmp_path / "in"), None, context).left_out == {
        ".md file": 1,
        ".part file": 1,
        "folder called 'logs'": 1,
        "image beside the shards": 1,
    }


def test_webdataset_of_our_own_keeps_split_and_classes(listed, tmp_path, photo):
    _files(tmp_path / "in", tuple(f"{name}/{n}.jpg" for name in ("ant", "bee") for n in range(10, 20)), photo)
    make_dataset(str(tmp_path / "in"), tmp_path / "a", eval_fraction=0.3, samples_per_shard=4, workers=2)
    rows = listed(tmp_path / "a")
    assert sum(row[2] for row in rows) == 6 and {row[1][0] for row in rows} == {"ant", "bee"}
    made = make_dataset(str(tmp_path / "a"), tmp_path / "b", samples_per_shard=100, seed=5, workers=2)
    assert made.info.classes == ["ant", "bee"] and made.info.eval.samples == 6 and len(made.info.train.shards) == 1
    assert read_info(tmp_path / "b").eval_fraction is None


def test_webdataset_with_several_labels_and_splits_by_name(context, tmp_path, photo, write_tar):
    for name in ("train-0", "train-1", "val-0"):
        labels = [1, 0] if name == "train-0" else [2]
        members = [("s.jpg", photo(1)), ("s.json", json.dumps({"labels": labels, "id": name}).encode())]
        (tmp_path / "in").mkdir(exist_ok=True)
        write_tar(tmp_path / "in" / f"{name}.tar", members)
    listing = list_source(str(tmp_path / "in"), None, context)
    assert [listing.labels_of(n) for n in range(3)] == [[1, 0], [2], [2]]
    assert listing.held_out.tolist() == [False, False, True] and listing.multi_label
    make_dataset(str(tmp_path / "in"), tmp_path / "out", workers=1, progress=lambda line: None)
    (sample,) = read_shard(str(tmp_path / "out" / "eval-000000.tar"))
    assert json.loads(sample["json"]) == {"labels": [2], "id": "val-0"} and sample["cls"] == b"2"


def test_labels_of_the_eval_source_are_mapped_by_name(context, tmp_path, photo):
    _files(tmp_path / "a", ("emu/1.jpg", "fox/1.jpg", "ant/1.jpg"), photo)
    _files(tmp_path / "b", ("emu/e.jpg", "fox/f.jpg"), photo)
    make_dataset(str(tmp_path / "b"), tmp_path / "shards", eval_fraction=0, workers=1, progress=lambda line: None)
    listing = list_with_eval(str(tmp_path / "a"), None, str(tmp_path / "shards"), None, context)
    names = {listing.name(n): listing.classes[listing.labels_of(n)[0]] for n in range(3, 5)}
    assert listing.classes == ["ant", "emu", "fox"] and listing.held_out.tolist() == [False] * 3 + [True] * 2
    assert sorted((name.rpartition("_")[2], label) for name, label in names.items()) == [("e", "emu"), ("f", "fox")]


def test_webdataset_labels_of_every_kind(listed, tmp_path, photo, write_tar):
    cases = {
        "text": ("cls", b" cat\n", ["cat"]),
        "mark": ("cls", b"\xef\xbb\xbfcat", ["cat"]),
        "list": ("cls", b'["cat", "dog"]', ["cat", "dog"]),
        "field": ("json", b'{"label": "dog"}', ["dog"]),
        "fields": ("json", b'{"labels": ["dog", "cat"]}', ["dog", "cat"]),
        "none": ("json", b'{"labels": []}', []),
    }
    members = [("__MACOSX/._text.jpg", b"x"), ("._text.jpg", b"x")]
    for key, (extension, content, _) in cases.items():
        members += [(f"{key}.jpg", photo(1)), (f"{key}.{extension}", content)]
    write_tar(tmp_path / "a.tar", members)
    found = {row[0]: row[1] for row in listed(tmp_path / "a.tar", format="webdataset")}
    assert found == {key: labels for key, (_, _, labels) in cases.items()}


def test_webdataset_labels_in_a_field_that_is_named(listed, context, tmp_path, photo, write_tar):
    write_tar(tmp_path / "a.tar", [("a.jpg", photo(1)), ("a.cls", b"7"), ("a.json", b'{"what": {"kind": "cat"}}')])
    context.labels = "json.what.kind"
    assert [row[1] for row in listed(tmp_path / "a.tar", format="webdataset")] == [["cat"]]
    context.labels = "json.what.else"
    with pytest.raises(UserError, match=r"sample 'a' of shard .* has no labels in 'json\.what\.else'"):
        listed(tmp_path / "a.tar", format="webdataset")


@pytest.mark.parametrize("label", [b"true", b"2.5", b"{}", b"[" * 100_000])
def test_webdataset_labels_that_are_none(listed, tmp_path, photo, write_tar, label):
    write_tar(tmp_path / "a.tar", [("a.jpg", photo(1)), ("a.json", b'{"label": ' + label + b"}")])
    with pytest.raises(UserError, match="sample 'a' of shard .* has a label that cannot be read"):
        listed(tmp_path / "a.tar", format="webdataset")


def test_webdataset_samples_that_cannot_be_used_are_faulty(context, tmp_path, photo, write_tar):
    members = [("a.jpg", photo(1)), ("a.cls", b"1"), ("b.jpg", photo(2)), ("b.txt", b""), ("c.cls", b"0")]
    members += [("d.jpg", photo(3)), ("d.json", b"{"), ("e.jpg", photo(4)), ("e.cls", b"null"), ("f.PPM", b"x")]
    write_tar(tmp_path / "a.tar", [*members, ("f.cls", b"0.0")])
    assert _of(list_source(str(tmp_path / "a.tar"), "webdataset", context)) == [
        ("a", ["1"]),
        ("b", "has no label"),
        ("c", "has no image"),
        ("d", "has a label that cannot be read"),
        ("e", "has no label"),
        ("f", ["0"]),
    ]


def test_webdataset_by_pattern(listed, shards):
    rows = listed(f"{shards}/part-{{0..1}}.tar")
    assert [row[0] for row in rows] == [f"s{n:03d}" for n in range(8)]
    with pytest.raises(UserError, match=r"there is no shard .*part-9\.tar"):
        listed(f"{shards}/part-{{1,9}}.tar")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.cls", b"1"), ("b.jpg", b"x")], "sample 'a' of shard .* has no image, only"),
        ([("a.jpg", b"x"), ("a.txt", b"x")], "neither a 'cls' member nor labels"),
        ([("a.jpg", b"x"), ("a.json", b"{")], "has a label that cannot be read"),
        ([("a.jpg", b"x"), ("a.cls", b"1"), ("a.jpg", b"y")], "the member 'jpg' of sample 'a' twice"),
    ],
)
def test_webdataset_that_cannot_serve(listed, tmp_path, write_tar, members, message):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message):
        listed(tmp_path / "a.tar", format="webdataset")


# --- what a source is


def test_unknown_sources(listed, tmp_path, write_tar):
    (tmp_path / "a.xyz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"a\.xyz is of no known kind: say with --format"):
        listed(tmp_path / "a.xyz")
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"a\.tar is damaged \(it has a damaged header at byte 0\)"):
        listed(tmp_path / "a.tar")
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(UserError, match=r"empty\.tar is empty"):
        listed(tmp_path / "empty.tar")
    write_tar(tmp_path / "text.tar", [("README", b"hi")])
    with pytest.raises(UserError, match=r"text\.tar holds README, of no known kind"):
        listed(tmp_path / "text.tar")


def test_listing_survives_a_round_trip(context, tmp_path):
    (tmp_path / "list.csv").write_text("path,labels\na/ä.jpg,x;y\nb.jpg,y\n")
    listing = list_source(str(tmp_path / "list.csv"), None, context)
    (tmp_path / "saved").mkdir()
    listing.save(tmp_path / "saved")
    again = Listing.load(tmp_path / "saved")
    assert again.files == listing.files and again.classes == ["x", "y"] and again.multi_label
    assert [(again.name(n), again.labels_of(n)) for n in range(2)] == [("a/ä.jpg", [0, 1]), ("b.jpg", [1])]
    arrays = [value for value in vars(listing).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) <= 2 * 41 + 3 * 4 + 2 * 8 + len("a/ä.jpgb.jpg") + 2
