"""The index against tarfile, and every kind of damage that it must name."""

import io
import json
import pickle
import tarfile
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

import fastvit_engine.data.shards.index as index_module
from fastvit_engine.cli import main
from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.data.shards.index import _HEADER, open_index, write_index
from fastvit_engine.data.shards.sample import parse_sample
from fastvit_engine.data.shards.tar import TarError
from fastvit_engine.errors import UserError
from fastvit_engine.storage import ShardStorage


def _samples_by_index(index) -> list[dict]:
    storage = ShardStorage(index.shards, index.sizes)
    samples = []
    for shard, count in enumerate(index.counts):
        offsets, lengths = index.extents(np.full(count, shard), np.arange(count))
        for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
            samples.append(parse_sample(storage.read(shard, offset, length), index.shards[shard]))
    return samples


def _archive(path: Path, names: list[str], format: int) -> Path:
    """Members with a folder, a link and contents of all sizes, in one of the three formats of tarfile."""
    with tarfile.open(path, "w", format=format, pax_headers={"comment": "x" * 600}) as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 511 * number % 1700
            info.mtime = 1.5 if format == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
            if number % 5 == 4:
                link = tarfile.TarInfo(f"link{number}.txt")
                link.type, link.linkname = tarfile.SYMTYPE, name[-20:]
                tar.addfile(link)
    return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_sample_is_what_a_reader_of_streams_gives(tmp_path, format):
    long = "deep/" * 25 if format != tarfile.USTAR_FORMAT else "deep/" * 22
    names = [f"{long if n % 3 else 'b.c/'}käse{n}.{ext}" for n in range(12) for ext in ("jpg", "seg.PNG", "json")]
    shards = [_archive(tmp_path / f"{n}.tar", names[: 36 - 3 * n], format) for n in range(3)]
    index = write_index([str(shard) for shard in shards], tmp_path / "shards.index")
    assert index.counts.tolist() == [12, 11, 10] and index.samples == 33
    assert _samples_by_index(index) == [sample for shard in shards for sample in read_shard(str(shard))]


def test_labels_as_text_list_and_field(tmp_path, write_tar):
    plain = write_tar(tmp_path / "a.tar", [(f"{n}.cls", text) for n, text in enumerate([b"3", b" 7\n", b"[3, 5]"])])
    fields = [b'{"label": 2}', b'{"label": [4, 2]}', b'{"other": 1}', b'{"label": null}']
    inside = write_tar(tmp_path / "b.tar", [(f"{n}.json", text) for n, text in enumerate(fields)])
    assert write_index([str(plain)], tmp_path / "a.index").class_counts() == {3: 2, 5: 1, 7: 1}
    index = write_index([str(inside)], tmp_path / "b.index", label_key="json.label")
    assert index.class_counts() == {2: 2, 4: 1} and index.unlabelled.tolist() == [2]
    assert index.shards_with_labels_outside(5) == [] and index.shards_with_labels_outside(4) == [0]


def test_the_hash_is_of_the_content_and_not_of_its_place(tmp_path, write_tar, sample_members):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for n in range(3):
            write_tar(tmp_path / folder / f"{n}.tar", sample_members(range(5 * n, 5 * n + 4)))
    here, there = (
        write_index([str(tmp_path / folder / f"{n}.tar") for n in range(3)], tmp_path / folder / "shards.index")
        for folder in ("here", "there")
    )
    assert here.hash == there.hash
    assert here.select(here.shards[1:]).hash not in (here.hash, here.select(here.shards[:2]).hash)
    elsewhere = here.select(there.shards)  # by file name, as after a copy or for a URL
    assert elsewhere.hash == here.hash and elsewhere.shards == there.shards
    assert _samples_by_index(elsewhere) == _samples_by_index(there)
    chosen = here.select([here.shards[2], here.shards[0]])
    assert [sample["__key__"] for sample in _samples_by_index(chosen)][::4] == ["s010", "s000"]
    assert _samples_by_index(pickle.loads(pickle.dumps(chosen))) == _samples_by_index(chosen)
    (tmp_path / "here").rename(tmp_path / "moved")
    assert _samples_by_index(open_index(tmp_path / "moved" / "shards.index"))[0]["__key__"] == "s000"
    write_tar(tmp_path / "there" / "0.tar", sample_members(range(9)))
    with pytest.raises(UserError, match=r"there/0\.tar is not in the index"):
        open_index(tmp_path / "moved" / "shards.index").select(there.shards)


def test_only_changed_shards_are_read_again(tmp_path, write_tar, sample_members, monkeypatch):
    shards = [str(write_tar(tmp_path / f"{n}.tar", sample_members(range(n, n + 3)))) for n in range(4)]
    first = write_index(shards[:3], tmp_path / "x.index")
    write_tar(tmp_path / "1.tar", sample_members(range(7)))
    read = []
    real = index_module.scan_shard
    monkeypatch.setattr(index_module, "scan_shard", lambda *given: read.append(given[1]) or real(*given))
    again = write_index(shards, tmp_path / "x.index")
    assert len(read) == 2 and again.counts.tolist() == [3, 7, 3, 3]
    assert again.hash == write_index(shards, tmp_path / "fresh.index").hash != first.hash
    assert again.class_counts() == open_index(tmp_path / "fresh.index").class_counts()


def test_several_processes_give_the_same_index(tmp_path, write_tar, sample_members):
    shards = [str(write_tar(tmp_path / f"{n}.tar", sample_members(range(n, n + 2)))) for n in range(8)]
    together = write_index(shards, tmp_path / "a.index", processes=2)
    alone = write_index(shards, tmp_path / "b.index", processes=1)
    assert together.hash == alone.hash and np.array_equal(together.starts, alone.starts)
    for shard in shards[:3]:
        Path(shard).write_bytes(Path(shard).read_bytes()[:2048])
    with pytest.raises(UserError, match=r"0\.tar is truncated.*; shard .*1\.tar is .*; shard .*2\.tar is .*make them"):
        write_index(shards, tmp_path / "c.index", processes=2)
    assert not list(tmp_path.glob("*c.index*"))


def test_shards_in_an_object_store_are_read_in_processes(s3_bucket, tmp_path, write_tar, sample_members):
    content = write_tar(tmp_path / "a.tar", sample_members(range(3))).read_bytes()
    urls = [f"s3://bucket/index/{n}.tar" for n in range(70)]
    for url in urls:
        s3_bucket.pipe_file(url.removeprefix("s3://"), content)
    index = write_index(urls, tmp_path / "remote.index")
    assert index.samples == 210 and index.shards == urls
    local = write_index([str(tmp_path / "a.tar")] * 70, tmp_path / "local.index")
    assert index.hash == local.hash
    with pytest.raises(UserError, match=r"shard s3://bucket/index/gone\.tar cannot be read"):
        write_index(["s3://bucket/index/gone.tar"], tmp_path / "x.index")


def _damages(whole: bytes) -> dict[str, tuple[bytes, str]]:
    third = whole.index(b"s002.jpg")
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    damaged = bytearray(whole)
    damaged[third + 3] ^= 1
    zeroed = bytearray(whole)
    zeroed[third : third + 512] = bytes(512)
    return {
        "empty": (b"", "is an empty file"),
        "without end": (whole[:end], rf"is truncated: there is no end marker at byte {end:,}"),
        "cut in a header": (whole[: third + 100], rf"is truncated: there is no end marker at byte {third:,}"),
        "cut in a member": (whole[: third + 600], rf"is truncated in the member that begins at byte {third:,}"),
        "flipped bit": (bytes(damaged), rf"has a damaged header at byte {third:,}"),
        "zeroed header": (bytes(zeroed), rf"has data after its end marker, at byte {third + 512:,}"),
        "garbage after": (whole + b"<html>", rf"has data after its end marker, at byte {len(whole):,}"),
        "not a tar": (b"<html>not found</html>" * 100, "has a damaged header at byte 0"),
        "gzipped": (b"\x1f\x8b" + whole, r"is gzipped: make plain tar files of it \(gunzip\), or .*data\.order=stream"),
    }


@pytest.mark.parametrize("damage", list(_damages(b"s002.jpg".ljust(600))))
def test_damage_is_named_with_its_byte(tmp_path, write_tar, sample_members, damage):
    path = write_tar(tmp_path / "bad.tar", sample_members(range(4)))
    content, message = _damages(path.read_bytes())[damage]
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^shard .*bad\.tar {message}") as error:
        write_index([str(path)], tmp_path / "x.index")
    assert "\n" not in str(error.value) and not (tmp_path / "x.index").exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "holds no samples: copy or make it again"),
        ([("README", b"x"), (".hidden.jpg", b"x")], "holds no samples"),
        ([("a.jpg", b"1"), ("a.cls", b"2"), ("a.JPG", b"3")], r"has the member 'jpg' of sample 'a' twice.* byte 2,048"),
        (
            [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")],
            r"has members of sample 'a' apart from each other: one more at byte 2,048",
        ),
        (
            [("a.jpg", b"1"), ("a.cls", b"2"), ("a.__KEY__", b"3")],
            r"has, in sample 'a', the member '__key__', but names with '__' in front are reserved, at byte 2,048",
        ),
        ([("a.jpg", b"1"), ("a.cls", b"cat")], r"in sample 'a', the label b'cat' in 'cls'.*not a class index.* 1,536"),
        ([("a.cls", b"[1, true]")], "not a class index"),
    ],
)
def test_archives_that_are_no_shards(tmp_path, write_tar, members, message):
    path = write_tar(tmp_path / "odd.tar", members)
    with pytest.raises(UserError, match=rf"odd\.tar .*{message.removeprefix('has ')}"):
        write_index([str(path)], tmp_path / "x.index")


@pytest.mark.parametrize("extension", ["__key__", "__url__", "__Other"])
def test_no_member_takes_the_place_of_what_a_sample_says_of_itself(tmp_path, write_tar, extension):
    members = [("a.jpg", b"1"), ("a.x__key__", b"2"), ("a__b.cls", b"3")]
    content = write_tar(tmp_path / "good.tar", members[:2]).read_bytes()
    assert parse_sample(content, "s") == {"__key__": "a", "__url__": "s", "jpg": b"1", "x__key__": b"2"}
    assert [sample["__key__"] for sample in read_shard(str(write_tar(tmp_path / "2.tar", members)))] == ["a", "a__b"]
    bad = write_tar(tmp_path / "bad.tar", [*members[:2], (f"a.{extension}", b"other")])
    with pytest.raises(TarError, match="are reserved, at byte 2,048"):
        parse_sample(bad.read_bytes(), "s")
    with pytest.raises(
        UserError, match=rf"bad\.tar is damaged \(it has, in sample 'a', the member '{extension.lower()}'"
    ):
        list(read_shard(str(bad)))


def test_at_most_ten_bad_shards_are_named(tmp_path):
    for n in range(12):
        (tmp_path / f"{n:02}.tar").touch()
    with pytest.raises(UserError) as error:
        write_index(sorted(map(str, tmp_path.glob("*.tar"))), tmp_path / "x.index")
    assert str(error.value).count("is an empty file") == 10 and "and perhaps more: copy or make them" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole: whole[:-1], "is not a whole index"),
        (lambda whole: whole[:30], "is not a whole index"),
        (lambda whole: b"something else" * 20, "is not a whole index"),
        (lambda whole: b"", "is not a whole index"),
        (lambda whole: bytes(len(whole)), "is not a whole index"),
        (lambda whole: whole + b"\0", "is not a whole index"),
        (lambda whole: whole[:8] + b"\x09" + whole[9:], "has version 9 and this engine reads version 2"),
        (lambda whole: whole[:8] + b"\x00" + whole[9:], "has version 0 and this engine reads version 2"),
        (lambda whole: whole[:8] + b"\x01" + whole[9:], "is not a whole index"),
        (lambda whole: whole[:16] + b"\xff" * 8 + whole[24:], "is not a whole index"),
        (lambda whole: whole.replace(b"cls", b"clx"), "is not a whole index"),
    ],
)
def test_an_index_that_cannot_be_used(tmp_path, write_tar, sample_members, change, message):
    path = tmp_path / "x.index"
    write_index([str(write_tar(tmp_path / "a.tar", sample_members(range(3))))], path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        open_index(path)
    with pytest.raises(UserError, match="there is no index"):
        open_index(tmp_path / "gone.index")


def test_no_byte_of_an_index_may_change(tmp_path, write_tar, sample_members):
    path = tmp_path / "x.index"
    write_index([str(write_tar(tmp_path / "a.tar", sample_members(range(3))))], path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(
            UserError, match=r"x\.index .*make it again with `fastvit data index SHARDS --out .*x\.index`$"
        ):
            open_index(path)


def _as_version_1(whole: bytes) -> bytes:
    """The same index as it was written before the starts had checksums."""
    magic, _, zero, samples, names_at, _, _ = _HEADER.unpack(whole[: _HEADER.size])
    body = _HEADER.size + 4 * samples
    names = json.loads(whole[body + names_at :])
    shards = names["columns"].pop("start_checksums")
    rest = whole[body : body + names_at - 4 * shards]
    text = json.dumps(names).encode()
    checksum = blake2b(rest + text, digest_size=16).digest()
    return (
        _HEADER.pack(magic, 1, zero, samples, len(rest), len(text), checksum) + whole[_HEADER.size : body] + rest + text
    )


@pytest.fixture
def two_shards(tmp_path, write_tar, sample_members) -> list[str]:
    return [str(write_tar(tmp_path / f"{n}.tar", sample_members(range(4 * n, 4 * n + 4)))) for n in range(2)]


def test_an_index_of_version_1_is_read(tmp_path, two_shards):
    path = tmp_path / "x.index"
    now = write_index(two_shards, path)
    path.write_bytes(_as_version_1(path.read_bytes()))
    before = open_index(path)
    assert before.hash == now.hash and before.class_counts() == now.class_counts()
    assert _samples_by_index(before) == _samples_by_index(now)
    assert _samples_by_index(before.select(two_shards[1:])) == _samples_by_index(now.select(two_shards[1:]))
    assert write_index(two_shards, path).start_checksums is not None  # and now it has them


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("all_at_once", [True, False])
def test_zeros_among_the_starts_blame_the_index(tmp_path, two_shards, monkeypatch, version, all_at_once, capsys):
    path = tmp_path / "x.index"
    good = _samples_by_index(write_index(two_shards, path))
    whole = path.read_bytes() if version == 2 else _as_version_1(path.read_bytes())
    at = _HEADER.size + 4 * 5  # of the second shard
    path.write_bytes(whole[:at] + bytes(8) + whole[at + 8 :])
    message = r"x\.index is damaged \(where the samples of .*1\.tar begin .*: make it again with `fastvit data index "
    if not all_at_once:
        monkeypatch.setattr(index_module, "_VERIFIED_AT_ONCE", 0)
        index = open_index(path)
        assert index.extents(np.zeros(4, np.int64), np.arange(4))[0][0] == 0
        for damaged in (index, index.select(two_shards[1:]), pickle.loads(pickle.dumps(index))):
            with pytest.raises(UserError, match=message):
                _samples_by_index(damaged)
    else:
        with pytest.raises(UserError, match=message):
            open_index(path)
    assert main(["data", "index", *two_shards, "--out", str(path)]) == 0  # the advice
    assert _samples_by_index(open_index(path)) == good


def test_command(tmp_path, write_tar, sample_members, capsys):
    for n in range(2):
        write_tar(tmp_path / f"{n}.tar", [*sample_members(range(n, n + 4)), ("x.jpg", b"no label")])
    out = tmp_path / "shards.index"
    assert main(["data", "index", str(tmp_path), f"{tmp_path}/0.tar", "--out", str(out)]) == 0
    assert "10 samples in 2 shards, 3 classes, 2 without a label, hash" in capsys.readouterr().out
    assert main(["data", "index", str(tmp_path), "--out", str(tmp_path / "shards")]) == 2
    assert main(["data", "index", f"{tmp_path}/x*.tar", "--out", str(out)]) == 2
    errors = capsys.readouterr().err
    assert "let its name end in .index" in errors and "matches no shards" in errors


def test_advice_of_the_index_works_when_it_is_followed(tmp_path, write_tar, sample_members, capsys):
    out = tmp_path / "all.index"
    shards = [str(write_tar(tmp_path / f"{n}.tar", sample_members(range(4 * n, 4 * n + 4)))) for n in range(2)]
    with pytest.raises(UserError, match=r"make it with `fastvit data index SHARDS --out .*all\.index`"):
        open_index(out)
    index = write_index(shards[:1], out)
    with pytest.raises(UserError, match=r"1\.tar is not in the index .*: add it with `fastvit data index SHARDS --out"):
        index.select(shards)
    assert main(["data", "index", f"{tmp_path}/*.tar", "--out", str(out)]) == 0
    assert open_index(out).select(shards).samples == 8
    (tmp_path / "folder.index").mkdir()
    assert main(["data", "index", *shards, "--out", str(tmp_path / "folder.index")]) == 2
    assert "folder.index cannot be written (Is a directory): choose another path for it" in capsys.readouterr().err


def test_what_belongs_to_no_sample_is_kept_by_the_index(tmp_path, write_tar, sample_members):
    path = write_tar(tmp_path / "a.tar", [("._s000.jpg", b"x"), *sample_members(range(3)), ("README", b"x")])
    index = write_index([str(path)], tmp_path / "x.index")
    assert index.ignored[0].total() == 2 and index.samples == 3
    again = write_index([str(path)], tmp_path / "x.index")  # whose shard is not read again
    assert again.ignored == index.ignored and again.select([str(path)]).ignored == index.ignored
    plain = write_index([str(write_tar(tmp_path / "b.tar", sample_members(range(3))))], tmp_path / "y.index")
    assert b"ignored" not in (tmp_path / "y.index").read_bytes() and plain.ignored[0].total() == 0


def test_an_index_names_no_command(tmp_path):
    """Whoever writes an index must not choose what is run."""
    columns = {name: [1] for name in index_module._COLUMNS}
    with open(tmp_path / "x.index", "wb") as file:
        file.write(bytes(index_module._HEADER.size + 4))
        index_module.write_columns(file, columns, ["pipe:touch pwned"], "cls")
    with pytest.raises(UserError, match="x.index names the command 'pipe:touch pwned', which runs only if it is given"):
        open_index(tmp_path / "x.index")
