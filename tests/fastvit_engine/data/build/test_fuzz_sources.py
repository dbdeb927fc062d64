"""Any bytes for the files of a source are listed or refused in one sentence, in bounded time and memory."""

import csv
import gzip
import io
import json
import pickle
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvit_engine.data.build.sources import list_source
from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.build.sources.devkit import DEVKIT, validation_labels
from fastvit_engine.observe.progress import WorkProgress
from tests.fastvit_engine.data.shards.tar_files import LIES
from tests.fastvit_engine.fuzzing import fuzz, mutated, read_or_refuse

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture
def listed(tmp_path: Path) -> Callable[[Path, str], None]:
    def run(path: Path, format: str) -> None:
        context = Context(tmp_path / "scratch", workers=1, progress=WorkProgress(quiet=True), say=lambda text: None)
        read_or_refuse(lambda: list_source(str(path), format, context))

    return run


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue().rstrip(b"\0") + bytes(1024)


# ---- CIFAR

BATCH = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1], b"filenames": [b"a", b"b"]}
PICKLES = [pickle.dumps(BATCH, protocol=protocol) for protocol in (2, 4, 5)]
PICKLES += [pickle.dumps({b"label_names": [b"a", b"b"], b"x": (1.5, None, True)}, protocol=2)]
OPCODES = [b"r\xff\xff\xff\x7f", b"\x96" + struct.pack("<Q", 1 << 40), b"\x86", b"}", b"]", b"R", b"b", b"u"]
OPCODES += [b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"c_codecs\nencode\n", b"cbuiltins\nexec\n", b"(", b"t", b"0"]


@fuzz
@given(content=mutated(PICKLES, OPCODES))
def test_pickles_of_cifar(tmp_path: Path, listed: Callable[[Path, str], None], content: bytes) -> None:
    folder = tmp_path / "cifar"
    folder.mkdir(exist_ok=True)
    for name in ("data_batch_1", "batches.meta"):
        (folder / name).write_bytes(content)
        listed(folder, "cifar")
        (folder / name).write_bytes(PICKLES[0] if name == "data_batch_1" else PICKLES[3])


@fuzz
@given(content=mutated([_tar({"c/data_batch_1": PICKLES[0], "c/batches.meta": PICKLES[3]}), *LIES.values()]))
def test_archives_of_cifar(tmp_path: Path, listed: Callable[[Path, str], None], content: bytes) -> None:
    for name, packed in (("c.tar", content), ("c.tar.gz", gzip.compress(content, 1)[: len(content)])):
        (tmp_path / name).write_bytes(packed)
        listed(tmp_path / name, "cifar")


# ---- idx

IMAGES = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 3, 3) + bytes(18)
LABELS = bytes([0, 0, 8, 1]) + struct.pack(">I", 2) + bytes([0, 1])


@fuzz
@given(content=mutated([IMAGES, LABELS, gzip.compress(IMAGES), gzip.compress(bytes(1 << 20))], [b"\xff\xff\xff\xff"]))
def test_idx(tmp_path: Path, listed: Callable[[Path, str], None], content: bytes) -> None:
    folder = tmp_path / "idx"
    folder.mkdir(exist_ok=True)
    good = {"x-images-idx3-ubyte": IMAGES, "x-labels-idx1-ubyte": LABELS}
    for name, suffix in [(name, suffix) for name in good for suffix in ("", ".gz")]:
        for other, whole in good.items():
            (folder / other).write_bytes(whole)
        (folder / name).unlink()
        (folder / (name + suffix)).write_bytes(content)
        listed(folder, "idx")
        (folder / (name + suffix)).unlink()


# ---- ImageNet's devkit, and lists


DEVKITS = [_tar({"d/data/ILSVRC2012_validation_ground_truth.txt": b"1\n2\n", "d/data/meta.mat": b"MATLAB 5.0"})]


@fuzz
@given(content=mutated([*DEVKITS, *LIES.values()]))
def test_devkits(tmp_path: Path, content: bytes) -> None:
    (tmp_path / DEVKIT).write_bytes(gzip.compress(content, 1))
    read_or_refuse(lambda: validation_labels(tmp_path / DEVKIT))


def _meta(compressed: bool) -> bytes:
    scipy_io = pytest.importorskip("scipy.io")
    synsets = np.zeros(2, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    synsets["ILSVRC2012_ID"], synsets["WNID"] = [1, 2], ["n01", "n02"]
    buffer = io.BytesIO()
    scipy_io.savemat(buffer, {"synsets": synsets}, do_compression=compressed)
    return buffer.getvalue()


@fuzz
@given(content=mutated([_meta(False), _meta(True)], [b"\xff\xff\xff\x7f", b"\x0e\0\0\0", b"\x0f\0\0\0"]))
def test_meta_mat(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "meta.mat").write_bytes(content)
    (tmp_path / "x_ground_truth.txt").write_text("1\n2\n")
    labels = read_or_refuse(lambda: validation_labels(tmp_path / "x_ground_truth.txt"))
    assert labels is None or all(re.fullmatch(r"n[0-9]+", wnid) for (wnid,) in labels)


@fuzz
@given(content=mutated([b'path,label\na.jpg,1\nb.jpg,"[1, 2]"\nc.jpg,x;y\n'], [b'"', b"[[[", b"10000000000"]))
def test_csv(tmp_path: Path, listed: Callable[[Path, str], None], content: bytes) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    listed(tmp_path / "list.csv", "list")
    assert csv.field_size_limit() <= 1 << 20


ROW = json.dumps({"path": "a.jpg", "label": 1}).encode() + b"\n" + json.dumps({"path": "b", "label": ["x"]}).encode()


@fuzz
@given(content=mutated([ROW], [b"10000000000", b"NaN", b"1e999", b"null", b"{}"]))
def test_jsonl(tmp_path: Path, listed: Callable[[Path, str], None], content: bytes) -> None:
    (tmp_path / "list.jsonl").write_bytes(content)
    listed(tmp_path / "list.jsonl", "list")


SHARD = _tar({"a.jpg": b"x" * 20, "a.cls": b"0", "b.jpg": b"x", "b.json": b'{"label": "ant"}'})


@fuzz
@given(content=mutated([SHARD, _tar({"ant.tar": _tar({"a.jpg": b"x"})}), *LIES.values()], [b"\n", b"10000000000"]))
def test_tars(tmp_path: Path, listed: Callable[[Path, str], None], content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    for format in ("webdataset", "class-tars", "flat-tar"):
        listed(tmp_path / "a.tar", format)


# ---- the files that say which images are which


def _rows_of_numbers(compressed: bool) -> bytes:
    buffer = io.BytesIO()
    variables = {"labels": np.array([[1, 2]], np.uint8), "trnid": np.array([[1.0]]), "valid": np.array([[2.0]])}
    pytest.importorskip("scipy.io").savemat(buffer, variables | {"tstid": np.ones((1, 1))}, do_compression=compressed)
    return buffer.getvalue()


@fuzz
@given(
    content=mutated([_rows_of_numbers(False), _rows_of_numbers(True)], [b"\xff\xff\xff\x7f", b"\x0f\0\0\0", b"\6\0"])
)
def test_labels_and_splits_of_flowers(tmp_path: Path, listed: Callable[[Path, str], None], content: bytes) -> None:
    (tmp_path / "flowers" / "jpg").mkdir(parents=True, exist_ok=True)
    for name in ("imagelabels.mat", "setid.mat"):
        for other in ("imagelabels.mat", "setid.mat"):
            (tmp_path / "flowers" / other).write_bytes(content if other == name else _rows_of_numbers(True))
        listed(tmp_path / "flowers", "flowers")


@fuzz
@given(content=mutated([b"# a comment\nBengal_1 2 1 1\nSphynx_2 1 1 2\n"], [b"\xff\xfe", b" 1 1", b"99999999999"]))
def test_lists_of_pets(tmp_path: Path, listed: Callable[[Path, str], None], content: bytes) -> None:
    for folder in ("images", "annotations"):
        (tmp_path / "pets" / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "pets" / "annotations" / "test.txt").write_bytes(b"Bengal_3 2 1 1\n")
    (tmp_path / "pets" / "annotations" / "trainval.txt").write_bytes(content)
    listed(tmp_path / "pets", "pets")


@fuzz
@given(
    content=mutated(
        [_tar({"annotations/trainval.txt": b"A_1 1 1 1\n", "annotations/test.txt": b"A_2 1 1 1\n"}), *LIES.values()]
    )
)
def test_archives_of_pets(tmp_path: Path, listed: Callable[[Path, str], None], content: bytes) -> None:
    (tmp_path / "packed").mkdir(exist_ok=True)
    for name in ("annotations.tar.gz", "images.tar.gz"):
        (tmp_path / "packed" / name).write_bytes(gzip.compress(content, 1))
    listed(tmp_path / "packed", "pets")


MAPPINGS = {
    "folder_to_objectnet_label.json": b'{"pen": "Pen", "toy": "Toy"}',
    "objectnet_to_imagenet_1k.json": b'{"Pen": "quill; ballpoint"}',
    "imagenet_to_label_2012_v2": b"quill\nballpoint\n",
    "pytorch_to_imagenet_2012_id.json": b'{"0": 1, "1": 0}',
}


@fuzz
@given(
    content=mutated(list(MAPPINGS.values()), [b"null", b"[]", b"1e999", b'"Pen"', b"; "]),
    name=st.sampled_from(list(MAPPINGS)),
)
def test_mappings_of_objectnet(tmp_path: Path, listed: Callable[[Path, str], None], content: bytes, name: str) -> None:
    folder = tmp_path / "objectnet"
    (folder / "images" / "pen").mkdir(parents=True, exist_ok=True)
    (folder / "images" / "pen" / "1.png").touch()
    (folder / "mappings").mkdir(exist_ok=True)
    for other, whole in MAPPINGS.items():
        (folder / "mappings" / other).write_bytes(content if other == name else whole)
    listed(folder, "objectnet")


@fuzz
@given(content=mutated([b"images/a.jpg 1\nb c.png 2\n\nd.jpg ant\n"], [b"\xff\xfe", b".jpg", b" ", b"1.0"]))
def test_lists_of_splits(tmp_path: Path, listed: Callable[[Path, str], None], content: bytes) -> None:
    (tmp_path / "lists").mkdir(exist_ok=True)
    (tmp_path / "lists" / "train.txt").write_bytes(content)
    (tmp_path / "lists" / "val.txt").write_bytes(b"images/e.jpg 1\n")
    listed(tmp_path / "lists", "split-lists")
