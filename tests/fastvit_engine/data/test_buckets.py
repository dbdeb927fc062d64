"""What is in a bucket is as what is on a disk: the same shards, dataset.json and messages, but for the path.

FASTVIT_TEST_BUCKETS=all goes through all kinds of sources.
"""

import csv
import io
import itertools
import json
import os
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastvit_engine.data.build.output as output_module
import fastvit_engine.data.shards.index as index_module
from fastvit_engine.cli import main
from fastvit_engine.data.build.make import make_dataset
from fastvit_engine.data.check.contact_sheet import class_sheet, save_sheet
from fastvit_engine.data.check.speed import Effort, measure_speed
from fastvit_engine.data.check.stats import shard_stats
from fastvit_engine.data.check.verify import verify_shards
from fastvit_engine.data.shards.index import INDEX_NAME, open_index, write_index
from fastvit_engine.data.shards.names import INFO_NAME, list_shards
from fastvit_engine.data.shards.remote_path import RemotePath, any_path
from fastvit_engine.data.stream.prepare import prepare_data
from fastvit_engine.errors import UserError

Bucket = Any  # boto3's client, which shares no code with the engine
_number = itertools.count()


@pytest.fixture(scope="module")
def client(s3_bucket) -> Bucket:
    return pytest.importorskip("boto3").client("s3")


@pytest.fixture
def url(client) -> str:
    """A folder of the bucket that is empty."""
    return f"s3://bucket/test-{next(_number)}"


def _key(url: str) -> str:
    return url.removeprefix("s3://bucket/")


def _upload(client: Bucket, folder: Path, url: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(Bucket="bucket", Key=f"{_key(url)}/{path.relative_to(folder)}", Body=path.read_bytes())
    return url


def _contents(client: Bucket, url: str) -> dict[str, bytes]:
    keys = [
        entry["Key"] for entry in client.list_objects_v2(Bucket="bucket", Prefix=f"{_key(url)}/").get("Contents", [])
    ]
    return {
        key.removeprefix(f"{_key(url)}/"): client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys
    }


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _make(source: object, out: object, **changes: Any) -> list[str]:
    lines: list[str] = []
    options = {"workers": 2, "samples_per_shard": 5, "eval_fraction": None, "progress": lines.append} | changes
    make_dataset(str(source), str(out), **options)
    return lines


# ---- sources


def _class_folders(folder: Path, photo: Callable[..., bytes], write_tar: Any) -> str:
    for number in range(18):
        path = folder / ("ant", "bee", "cow #1+2")[number % 3] / f"a b{number}.jpg"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(photo(number))
    for name in (
        "ant/notes.txt",
        "bee/.hidden.jpg",
        "__MACOSX/x/1.jpg",
        "ant/.thumbnails/1.jpg",
        "cow #1+2/deep/er/z.jpg",
    ):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(photo(50))
    (folder / "bee" / "broken.jpg").write_bytes(b"no image")
    return ""


def _split_folders(folder: Path, photo: Callable[..., bytes], write_tar: Any) -> str:
    for number in range(16):
        path = folder / ("train", "val")[number > 10] / ("ant", "bee")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(photo(number))
    return ""


def _class_tars(folder: Path, photo: Callable[..., bytes], write_tar: Any) -> str:
    for name in ("ant", "bee"):
        write_tar(folder / f"{name}.tar", [(f"{name}_{n}.JPEG", photo(n + len(name))) for n in range(7)])
    return ""


def _folder_tar(folder: Path, photo: Callable[..., bytes], write_tar: Any) -> str:
    members = [(f"top/{('ant', 'bee')[n % 2]}/{n}.jpg", photo(n)) for n in range(14)]
    write_tar(folder / "images.tar.gz", members)
    return "/images.tar.gz"


def _webdataset(folder: Path, photo: Callable[..., bytes], write_tar: Any) -> str:
    for number, name in enumerate(("train-0", "train-1", "val-0")):
        members = []
        for n in range(6):
            members += [(f"{number}{n}.jpg", photo(10 * number + n)), (f"{number}{n}.cls", str(n % 3).encode())]
        write_tar(folder / f"{name}.tar", [*members, ("._x", b"")])
    return ""


def _webdataset_glob(folder: Path, photo: Callable[..., bytes], write_tar: Any) -> str:
    _webdataset(folder, photo, write_tar)
    return "/train-*.tar"


def _webdataset_braces(folder: Path, photo: Callable[..., bytes], write_tar: Any) -> str:
    _webdataset(folder, photo, write_tar)
    return "/{train-{0..1},val-0}.tar"


def _csv(folder: Path, photo: Callable[..., bytes], write_tar: Any) -> str:
    (folder / "images").mkdir()
    with open(folder / "list.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        for n in range(14):
            (folder / "images" / f"{n}.jpg").write_bytes(photo(n))
            rows.writerow([f"images/{n}.jpg", ("ant", "bee")[n % 2]])
        rows.writerow(["images/missing.jpg", "ant"])
    return "/list.csv"


def _parquet(folder: Path, photo: Callable[..., bytes], write_tar: Any) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for split, numbers in (("train", range(10)), ("validation", range(10, 14))):
        images = [{"bytes": photo(n), "path": f"{n}.jpg"} for n in numbers]
        table = pyarrow.table({"image": images, "label": [n % 2 for n in numbers]})
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return ""


def _idx(folder: Path, photo: Callable[..., bytes], write_tar: Any) -> str:
    rng = np.random.default_rng(0)
    for name, count in (("train", 12), ("t10k", 4)):
        pixels = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in pixels.shape)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = bytes(n % 3 for n in range(count))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + count.to_bytes(4, "big") + labels)
    return ""


def _pets(folder: Path, photo: Callable[..., bytes], write_tar: Any) -> str:
    lists = {split: [f"{('Ant', 'bee')[n % 2]}_{n}" for n in numbers] for split, numbers in SPLIT_NUMBERS.items()}
    images = [(f"images/{name}.jpg", photo(n)) for n, name in enumerate([*lists["trainval"], *lists["test"]])]
    lines = {split: "".join(f"{name} {1 + (name[0] == 'b')} 1 1\n" for name in names) for split, names in lists.items()}
    write_tar(folder / "images.tar.gz", [*images, ("images/._x.jpg", b""), ("images/Ant_1.mat", b"")])
    write_tar(
        folder / "annotations.tar.gz", [(f"annotations/{name}.txt", text.encode()) for name, text in lines.items()]
    )
    return ""


def _flowers(folder: Path, photo: Callable[..., bytes], write_tar: Any) -> str:
    savemat = pytest.importorskip("scipy.io").savemat
    (folder / "jpg").mkdir()
    for n in range(1, 10):
        (folder / "jpg" / f"image_{n:05d}.jpg").write_bytes(photo(n))
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 1, 2, 1, 2, 1, 2, 2]], np.uint8)})
    savemat(folder / "setid.mat", {"trnid": [[1, 2, 3]], "valid": [[4, 5]], "tstid": [[6, 7, 8]]})
    return ""


def _objectnet(folder: Path, photo: Callable[..., bytes], write_tar: Any) -> str:
    mappings = {
        "folder_to_objectnet_label.json": {"pen": "Pen", "toy": "Toy"},
        "objectnet_to_imagenet_1k.json": {"Pen": "b; a"},
    }
    mappings["pytorch_to_imagenet_2012_id.json"] = {"0": 1, "1": 0}
    (folder / "mappings").mkdir()
    (folder / "mappings" / "imagenet_to_label_2012_v2").write_text("a\nb\n")
    for name, content in mappings.items():
        (folder / "mappings" / name).write_text(json.dumps(content))
    for n in range(8):
        path = folder / "images" / ("pen", "toy")[n % 2] / f"{n}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(photo(n))
    return ""


def _split_lists(folder: Path, photo: Callable[..., bytes], write_tar: Any) -> str:
    (folder / "images").mkdir()
    for split, numbers in SPLIT_NUMBERS.items():
        (folder / f"{split}.txt").write_text("".join(f"images/{n} x.jpg {n % 3}\n" for n in numbers))
        for n in numbers:
            (folder / "images" / f"{n} x.jpg").write_bytes(photo(n))
    return ""


SPLIT_NUMBERS = {"trainval": range(8), "test": range(8, 12)}
SOURCES = [_class_folders, _webdataset_glob, _csv, _parquet]
OTHER_SOURCES = [_split_folders, _class_tars, _folder_tar, _webdataset, _webdataset_braces, _idx]
OTHER_SOURCES += [_pets, _flowers, _objectnet, _split_lists]
ALL = os.environ.get("FASTVIT_TEST_BUCKETS") == "all"


def _name(function: Any) -> str:
    return str(function.__name__).lstrip("_")


@pytest.mark.parametrize("write_source", SOURCES, ids=_name)
def test_a_source_in_a_bucket_gives_the_shards_of_one_on_a_disk(client, url, tmp_path, photo, write_tar, write_source):
    _check_source(client, url, tmp_path, photo, write_tar, write_source)


@pytest.mark.skipif(not ALL, reason="FASTVIT_TEST_BUCKETS=all goes through all kinds of sources")
@pytest.mark.parametrize("write_source", OTHER_SOURCES, ids=_name)
def test_any_other_source_too(client, url, tmp_path, photo, write_tar, write_source):
    _check_source(client, url, tmp_path, photo, write_tar, write_source)


def _check_source(client: Bucket, url: str, tmp_path: Path, photo: Any, write_tar: Any, write_source: Any) -> None:
    (tmp_path / "in").mkdir()
    name = write_source(tmp_path / "in", photo, write_tar)
    _upload(client, tmp_path / "in", f"{url}/in")
    here = _make(f"{tmp_path}/in{name}", tmp_path / "out", max_failed=0.3)
    there = _make(f"{url}/in{name}", f"{url}/out", max_failed=0.3)
    assert [line.replace(url, str(tmp_path)) for line in there] == here
    made, expected = _contents(client, f"{url}/out"), _files(tmp_path / "out")
    assert open_index(any_path(f"{url}/out/{INDEX_NAME}")).hash == open_index(tmp_path / "out" / INDEX_NAME).hash
    del made[INDEX_NAME], expected[INDEX_NAME]  # which have the times of the files
    for contents in (made, expected):
        for text in (INFO_NAME, "failed.jsonl"):
            contents[text] = contents.get(text, b"").replace(url.encode(), str(tmp_path).encode())
    assert made[INFO_NAME].decode().splitlines() == expected[INFO_NAME].decode().splitlines()
    assert made == expected


def test_a_local_list_of_urls_of_objects(client, url, tmp_path, photo):
    for n in range(12):
        client.put_object(Bucket="bucket", Key=f"{_key(url)}/a b#{n}.jpg", Body=photo(n))
    rows = [json.dumps({"url": f"{url}/a b#{n}.jpg", "label": n % 2}) for n in range(13)]
    (tmp_path / "list.jsonl").write_text("\n".join(rows))
    _make(tmp_path / "list.jsonl", tmp_path / "out", max_failed=0.2)
    info = json.loads((tmp_path / "out" / INFO_NAME).read_text())
    assert info["train"]["samples"] + info["eval"]["samples"] == 12
    assert info["left_out"] == {"image that failed (cannot be read)": 1}


# ---- runs that were stopped


def _photos(folder: Path, photo: Callable[..., bytes], count: int = 40) -> Path:
    for number in range(count):
        path = folder / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(photo(number))
    return folder


def test_a_stopped_run_keeps_whole_shards_and_ends_as_if_it_had_not_been(client, url, tmp_path, photo, monkeypatch):
    source = _photos(tmp_path / "in", photo)
    _make(source, tmp_path / "whole", workers=1)
    real = output_module.RemoteOutput.write_receipt

    def killed(self: Any, shard: str, content: bytes, temporary: Path) -> None:
        if shard == "train-000003.tar":
            raise KeyboardInterrupt
        real(self, shard, content, temporary)

    with monkeypatch.context() as patch:
        patch.setattr(output_module.RemoteOutput, "write_receipt", killed)
        with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
            _make(source, url, workers=1)
    whole = _files(tmp_path / "whole")
    left = _contents(client, url)
    assert INFO_NAME not in left and INDEX_NAME not in left
    shards = {name: content for name, content in left.items() if name.endswith(".tar") and "/" not in name}
    assert sorted(shards) == [f"train-{n:06d}.tar" for n in range(4)]
    assert all(whole[name] == content for name, content in shards.items())
    with pytest.raises(UserError, match="whose shards are not all made: run its `fastvit data make` again"):
        list_shards([url], "train")
    with pytest.raises(UserError, match="is being made with --seed 0, not with --seed 1"):
        _make(source, url, seed=1)

    spoiled = f"{_key(url)}/train-000001.tar"
    client.put_object(Bucket="bucket", Key=spoiled, Body=bytes(len(shards["train-000001.tar"])))
    kept = {
        n: client.head_object(Bucket="bucket", Key=f"{_key(url)}/train-00000{n}.tar")["LastModified"] for n in (0, 2)
    }
    lines = _make(source, url, workers=1)
    assert lines[0] == f"{url}: 2 of 9 shards are complete, making the others"
    for n, modified in kept.items():
        again = client.head_object(Bucket="bucket", Key=f"{_key(url)}/train-00000{n}.tar")
        assert again["LastModified"] == modified
    made = _contents(client, url)
    assert sorted(made) == sorted(whole)
    assert {name: made[name] for name in made if name != INDEX_NAME} == {n: whole[n] for n in whole if n != INDEX_NAME}
    assert _make(source, url) == [f"{url} is already made: 36 train and 4 eval samples"]


def test_parts_and_a_folder_of_someone_else(client, url, tmp_path, photo):
    source = _photos(tmp_path / "in", photo)
    _make(source, tmp_path / "whole")
    _make(source, url, plan_only=True)
    for part in (1, 2):
        _make(source, url, part=(part, 2))
    assert _contents(client, url)[INFO_NAME] == (tmp_path / "whole" / INFO_NAME).read_bytes()
    client.put_object(Bucket="bucket", Key=f"{_key(url)}-other/notes.txt", Body=b"mine")
    with pytest.raises(UserError, match="is not empty and was not made by `fastvit data make`: choose another --out"):
        _make(source, f"{url}-other")
    assert _contents(client, f"{url}-other") == {"notes.txt": b"mine"}


def test_an_error_before_the_first_whole_shard_leaves_nothing_behind(client, url, tmp_path, photo):
    source = _photos(tmp_path / "in", photo, 4)
    (source / "class0" / "0.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"0\.jpg is not an image"):
        _make(source, url, samples_per_shard=100, eval_fraction=0)
    assert _contents(client, url) == {}


# ---- index, verify, stats, show, bench


@pytest.fixture
def made(client, url, tmp_path, photo) -> tuple[str, Path]:
    """The same data set in the bucket and here."""
    _make(_photos(tmp_path / "in", photo), tmp_path / "out", eval_fraction=0.2)
    return _upload(client, tmp_path / "out", url), tmp_path / "out"


def test_verify_and_stats_say_of_a_bucket_what_they_say_of_a_disk(client, made):
    there, here = made
    assert verify_shards(there, workers=2).to_json() == verify_shards(str(here), workers=2).to_json()
    for split in (None, "train", "eval"):
        assert shard_stats(there, split=split, workers=2).to_json() == shard_stats(str(here), split=split).to_json()
    client.delete_object(Bucket="bucket", Key=f"{_key(there)}/train-000002.tar")
    (here / "train-000002.tar").unlink()
    content = (here / "train-000001.tar").read_bytes()[:-2000]
    (here / "train-000001.tar").write_bytes(content)
    client.put_object(Bucket="bucket", Key=f"{_key(there)}/train-000001.tar", Body=content)
    expected, found = verify_shards(str(here), workers=1).report(), verify_shards(there, workers=1).report()
    assert found.replace(there, str(here)) == expected
    assert f"{there}/train-000002.tar, which dataset.json lists, does not exist" in found


def test_an_index_is_made_beside_the_shards_and_read_again_only_what_changed(client, made, tmp_path, monkeypatch):
    there, here = made
    client.delete_object(Bucket="bucket", Key=f"{_key(there)}/{INDEX_NAME}")
    shards = list_shards([f"{there}/"])
    first = write_index(shards, any_path(f"{there}/{INDEX_NAME}"))
    assert first.hash == write_index(list_shards([str(here)]), tmp_path / INDEX_NAME).hash
    assert first.where == f"{there}/{INDEX_NAME}"
    again = open_index(any_path(f"{there}/{INDEX_NAME}"))
    assert again.shards == shards and again.samples == 40
    scanned = []
    real = index_module.scan_shard
    monkeypatch.setattr(index_module, "scan_shard", lambda *given: scanned.append(given[1]) or real(*given))
    write_index(shards, any_path(f"{there}/{INDEX_NAME}"))
    assert scanned == []
    content = (here / "train-000000.tar").read_bytes() + bytes(512)
    client.put_object(Bucket="bucket", Key=f"{_key(there)}/train-000000.tar", Body=content)
    write_index(shards, any_path(f"{there}/{INDEX_NAME}"))
    assert scanned == [len(content)]


def test_the_command_writes_the_index_beside_the_shards(client, made, capsys):
    there, here = made
    client.delete_object(Bucket="bucket", Key=f"{_key(there)}/{INDEX_NAME}")
    assert main(["data", "index", f"{there}/"]) == 0
    assert capsys.readouterr().out.startswith(f"{there}/{INDEX_NAME}: 40 samples in 9 shards, 2 classes, hash ")
    assert main(["data", "index", str(here), "--out", f"{there}/local.index"]) == 0
    assert open_index(any_path(f"{there}/local.index")).shards == list_shards([str(here)])


def test_a_remote_index_is_named_in_a_configuration(client, made, make_config, tmp_path):
    there, here = made
    content = (here / INDEX_NAME).read_bytes()
    client.delete_object(Bucket="bucket", Key=f"{_key(there)}/{INDEX_NAME}")
    client.put_object(Bucket="bucket", Key=f"{_key(there)}-other/mine.index", Body=content)
    settings = {"train": f"{there}/train-*.tar", "eval": f"{there}/eval-*.tar", "index": f"{there}-other/mine.index"}
    data = prepare_data(make_config(**settings), world_size=1, index_folder=tmp_path / "run")
    local = make_config(f"{here}/train-*.tar", f"{here}/eval-*.tar")
    expected = prepare_data(local, world_size=1, index_folder=tmp_path / "run")
    assert data.fingerprint(local.data) == expected.fingerprint(local.data)
    missing = make_config(**settings | {"index": f"{there}/none.index"})
    with pytest.raises(UserError, match=rf"there is no index {there}/none\.index: make it with"):
        prepare_data(missing, world_size=1, index_folder=tmp_path / "run")


def test_sheets_are_drawn_of_a_bucket_and_into_one(client, made):
    there, here = made
    save_sheet(class_sheet(there), any_path(f"{there}-sheets/a.png"))
    expected = io.BytesIO()
    class_sheet(str(here)).save(expected, "PNG", optimize=True)
    (sheet,) = _contents(client, f"{there}-sheets").values()
    assert len(sheet) > 1000 and sheet[:8] == expected.getvalue()[:8]


def test_bench_reads_shards_of_a_bucket(made, make_config):
    (speed,) = measure_speed(made[0], make_config(made[0]), workers=0, effort=Effort(rounds=1, images=8))
    assert speed.name == made[0] and speed.loader_rate(0, "wall") > 0


# ---- what cannot be


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (
            "https://user:secret@host/x",
            "https://host/x is on a web server, which is only read: name a local path or an",
        ),
        ("s3://no-such-bucket/x", "no-such-bucket"),
    ],
)
def test_a_folder_that_cannot_be_written(client, tmp_path, photo, out, message):
    source = _photos(tmp_path / "in", photo, 4)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        _make(source, out, eval_fraction=0)
    assert "secret" not in str(error.value)


def test_paths_on_servers():
    path = RemotePath.of("s3://bucket/a/b.tar.gz")
    assert (path.name, path.stem, path.suffix) == ("b.tar.gz", "b.tar", ".gz")
    assert str(path.parent) == "s3://bucket/a" and [str(p) for p in path.parents] == ["s3://bucket/a", "s3://bucket"]
    assert str(path.with_name("c")) == "s3://bucket/a/c" and path.parent / "b.tar.gz" == path
    signed = RemotePath.of("https://host/a/list.csv?sig=x/y")
    assert (signed.name, signed.suffix, str(signed.parent)) == ("list.csv", ".csv", "https://host/a")


def _ends_in_one_sentence(capsys: Any, *words: str) -> str:
    """The message of a command that ends with exit code 2."""
    assert main(["data", *words]) == 2
    message: str = capsys.readouterr().err
    assert message.count("\n") == 1 and "Traceback" not in message
    return message


def _commands(url: str, folder: Path) -> list[list[str]]:
    return [
        ["make", str(folder), "--out", f"{url}/out"],
        ["make", f"{url}/in", "--out", str(folder / "out")],
        ["index", f"{url}/in"],
        ["verify", f"{url}/in"],
        ["stats", f"{url}/in/a.tar"],
    ]


def test_a_bucket_that_does_not_exist(client, tmp_path, photo, capsys):
    for command in _commands("s3://no-such-bucket", _photos(tmp_path / "in", photo, 4)):
        assert "s3://no-such-bucket/" in _ends_in_one_sentence(capsys, *command)


def test_access_that_is_denied(client, tmp_path, photo, capsys, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Denying)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    try:
        for command in _commands("s3://bucket", _photos(tmp_path / "in", photo, 4)):
            message = _ends_in_one_sentence(capsys, *command)
            assert "s3://bucket/" in message and "denied" in message.lower()
    finally:
        server.shutdown()
        server.server_close()


class _Denying(BaseHTTPRequestHandler):
    """A store that gives nothing."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


def test_credentials_that_are_missing(client, tmp_path, photo, capsys, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "config").write_text("[default]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    command = _commands("s3://bucket", _photos(tmp_path / "in", photo, 4))[0]
    assert "s3://bucket/" in _ends_in_one_sentence(capsys, *command)
