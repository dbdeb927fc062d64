"""Any bytes for a shard, label, index or dataset.json are read or refused in one sentence, in time and memory."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvit_engine.data.build.parallel import Counter
from fastvit_engine.data.build.sources.tars import files_of, first_members
from fastvit_engine.data.check.verify import verify_shard
from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.data.shards.index import Index, open_index, write_index
from fastvit_engine.data.shards.labels import json_field, label_values, parse_labels
from fastvit_engine.data.shards.names import list_shards, read_info
from fastvit_engine.data.shards.sample import parse_sample
from fastvit_engine.data.shards.tar import TarError, iterate_members
from fastvit_engine.data.shards.usable import SampleKeys
from tests.fastvit_engine.data.shards.tar_files import LIES
from tests.fastvit_engine.fuzzing import fuzz, mutated, read_or_refuse

pytestmark = pytest.mark.timeout(3600)


def _tar(format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in [("käse/" * 25 + "a.jpg", b"x" * 700), ("b.cls", b"3"), ("b.json", b'{"label": [1, 2]}')]:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5 if format == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue().rstrip(b"\0") + bytes(1024)


TARS = [_tar(format) for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)] + list(LIES.values())
WORDS = [
    b"x",
    b"g",
    b"L",
    b"K",
    b"0 a=\n",
    b"3 \nx=y\n",
    b"20 size=abc\n",
    b"26 path=a/../b.jpg\n",
    b"\x80",
    b"ustar\0",
]
WORDS += [b"-0000001000\0", b"77777777777\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"20 GNU.sparse.map=1\n"]


def _with_checksums(content: bytes) -> bytes:
    """Right checksums for what may be headers, so that mutations of other fields are seen."""
    blocks = bytearray(content)
    for at in range(0, len(blocks) - 511, 512):
        if blocks[at + 257 : at + 262] == b"ustar":
            blocks[at + 148 : at + 156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % (sum(blocks[at : at + 512]) & 0o777777)
    return bytes(blocks)


@fuzz
@given(content=mutated(TARS, WORDS), valid=st.booleans())
def test_tars(tmp_path: Path, content: bytes, valid: bool) -> None:
    content = _with_checksums(content) if valid else content

    def read(at: int, length: int) -> bytes:
        assert at >= 0 and 0 <= length <= 1 << 21, "reads without a bound"
        return content[at : at + length]

    for size in (len(content), None):
        members = read_or_refuse(lambda size=size: list(iterate_members(read, size)), TarError)
        starts = [member.start for member in members or []]
        assert starts == sorted(set(starts))
    read_or_refuse(lambda: parse_sample(content, "a.tar"), TarError)

    path = tmp_path / "a.tar"
    path.write_bytes(content)
    index = read_or_refuse(lambda: write_index([str(path)], tmp_path / "x.index", label_key="json.label"))
    samples = read_or_refuse(lambda: list(read_shard(str(path))))
    if index is not None:
        assert samples is not None and len(samples) == index.samples
    verdict = read_or_refuse(
        lambda: verify_shard(str(path), SampleKeys("jpg", ("jpg",), "cls", "cls", [], 1, 10**6), 9, Counter())
    )
    assert verdict is not None and (samples is not None) != ("damaged shard" in verdict.findings)
    read_or_refuse(lambda: list(files_of(path)))
    read_or_refuse(lambda: first_members(path, 8))


@fuzz
@given(
    content=mutated(
        [b"3", b"[1, 2]", b'{"label": [1, {"a": null}], "b": {"label": 2.5}}'], [b"NaN", b"1e999", b"\xef\xbb\xbf"]
    )
)
def test_labels(content: bytes) -> None:
    for path in ([], ["label"], ["b", "label"]):
        labels = read_or_refuse(lambda path=path: parse_labels(content, path), ValueError)
        assert labels is None or all(type(label) is int and abs(label) <= 2**63 for label in labels)
        read_or_refuse(lambda path=path: label_values(content, path), ValueError)
    read_or_refuse(lambda: json_field(content, ["label", "a"]), ValueError)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("index")
    (folder / "a.tar").write_bytes(TARS[0])
    write_index([str(folder / "a.tar")], folder / "x.index", label_key="json.label")
    return (folder / "x.index").read_bytes()


@fuzz
@given(data=st.data())
def test_indexes(tmp_path: Path, index: bytes, data: st.DataObject) -> None:
    path = tmp_path / "x.index"
    content = data.draw(mutated([index], [b"\x01\0\0\0", b"\x02\0\0\0"]))
    path.write_bytes(content)

    def use() -> Index:
        opened = open_index(path)
        opened.extents(np.zeros(2, np.int64), np.arange(2))
        return opened

    assert read_or_refuse(use) is None or content == index


INFO = {
    "classes": ["a", "b"], "source": "x", "seed": 0, "eval_fraction": 0.1, "samples_per_shard": 9,
    "train": {"samples": 3, "shards": {"train-0.tar": 3}}, "eval": {"samples": 0, "shards": {}},
}  # fmt: skip


@fuzz
@given(content=mutated([json.dumps(INFO).encode()], [b"NaN", b"1e999", b"null", b"{}"]))
def test_dataset_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "dataset.json").write_bytes(content)
    read_or_refuse(lambda: read_info(tmp_path))


@fuzz
@given(
    content=mutated(
        [b"a-{0..3}.tar\n# no\n\npipe:cat a.tar\n", b"{a,{b,c}}.tar"], [b"{0..99999999999}", b"{", b"}", b","]
    )
)
def test_lists(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    # A million names, the most that are allowed, take seconds while their memory is traced.
    read_or_refuse(lambda: list_shards([f"@{tmp_path}/list.txt"]), seconds=60)
