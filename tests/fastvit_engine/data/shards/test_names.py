import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvit_engine.data.shards.names import find_shards, info_beside, shard_set
from fastvit_engine.errors import UserError

INFO = {
    "classes": ["ant", "bee"],
    "source": "x",
    "seed": 0,
    "eval_fraction": 0.1,
    "samples_per_shard": 5,
    "train": {"samples": 8, "shards": {"train-000000.tar": 5, "train-000001.tar": 3}},
    "eval": {"samples": 2, "shards": {"eval-000000.tar": 2}},
}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    for name in ("train-000000.tar", "train-000001.tar", "eval-000000.tar"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "dataset.json").write_text(json.dumps(INFO))
    return tmp_path


def _names(shards: list[str]) -> list[str]:
    return [Path(shard).name for shard in shards]


def test_folder_gives_its_tar_files_sorted(tmp_path):
    for name in ("b.tar", "a.tar.gz", "c.tgz", "README.md"):
        (tmp_path / name).touch()
    assert _names(find_shards(str(tmp_path), "train")) == ["a.tar.gz", "b.tar", "c.tgz"]


def test_folder_with_dataset_json_gives_the_split_only(made):
    assert _names(find_shards(str(made), "train")) == ["train-000000.tar", "train-000001.tar"]
    assert _names(find_shards(str(made), "eval")) == ["eval-000000.tar"]


@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{000000..000001}.tar", "{train-000001,train-00000*}.tar"])
def test_glob_and_braces(made, pattern):
    assert _names(find_shards(f"{made}/{pattern}", "train")) == ["train-000000.tar", "train-000001.tar"]


def test_urls_are_expanded_but_not_looked_up():
    assert find_shards("https://host/s-{0..1}.tar", "train") == ["https://host/s-0.tar", "https://host/s-1.tar"]
    assert find_shards("pipe:cat /x/{a,b}.tar", "train") == ["pipe:cat /x/a.tar", "pipe:cat /x/b.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "data.train is not set"),
        ("{folder}/none-*.tar", "matches no shards: correct it"),
        ("{folder}/train-000007.tar", "train-000007.tar, which does not exist: copy it there"),
        ("{folder}/zzz", "zzz, which does not exist: copy it there"),
        ("{folder}/train-{{000000..000002}}.tar", "train-000002.tar, which does not exist"),
        ("{folder}/train-{{000000..000001.tar", "braces"),
    ],
)
def test_bad_patterns(made, pattern, message):
    with pytest.raises(UserError, match=message):
        find_shards(pattern.format(folder=made), "train")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_of_shards_in_any_encoding(made, tmp_path, encoding):
    text = f"{made}/train-000000.tar\r\n\r\n# of last year\n{made}/eval-*.tar\n"
    (tmp_path / "list.txt").write_bytes(text.encode(encoding))
    assert _names(find_shards(f"@{tmp_path}/list.txt", "train")) == ["eval-000000.tar", "train-000000.tar"]
    (tmp_path / "list.txt").write_bytes("ä.tar".encode("latin-1"))
    with pytest.raises(UserError, match="list .* which cannot be read \\(it is not text\\): correct it"):
        find_shards(f"@{tmp_path}/list.txt", "train")


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="matches no shards"):
        find_shards(str(tmp_path), "train")


@pytest.mark.parametrize("name", ["list.csv", "LIST.TSV", "list.jsonl", "train-0.parquet"])
def test_a_table_of_images_is_told_how_to_become_shards(tmp_path, name):
    (tmp_path / name).touch()
    makes = rf"names {tmp_path}/{name}, which is no shard: run `fastvit data make {tmp_path}/{name} --out data/new`"
    with pytest.raises(UserError, match=makes):
        find_shards(f"{tmp_path}/{name}", "train")
    with pytest.raises(UserError, match=makes):
        shard_set(f"{tmp_path}/*{name[-5:]}")


@pytest.mark.parametrize("image", ["1.jpg", "cat/1.JPG", "train/cat/1.png"])
def test_a_folder_of_images_is_told_how_to_become_shards(tmp_path, image):
    path = tmp_path / "photos" / image
    path.parent.mkdir(parents=True)
    path.touch()
    makes = rf"holds images, not shards: run `fastvit data make {tmp_path}/photos --out data/photos`"
    with pytest.raises(UserError, match=makes):
        find_shards(f"{tmp_path}/photos", "train")
    with pytest.raises(UserError, match=makes):
        shard_set(f"{tmp_path}/photos")


@pytest.mark.parametrize("pattern", ["photo", "photo/train-*.tar", "photo/"])
def test_a_missing_folder_is_told_the_one_beside_it(tmp_path, pattern):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=f"did you mean {tmp_path}/photos"):
        find_shards(f"{tmp_path}/{pattern}", "train")


@pytest.mark.parametrize("text", ["{", '{"classes": ["a"]}', json.dumps(INFO | {"classes": 3}), "", "\0" * 700])
def test_damaged_dataset_json(made, text):
    (made / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json is not what"):
        find_shards(str(made), "train")


# ---- splits by name, when nothing else says them


def test_names_of_shards_say_the_split(tmp_path):
    for name in ("imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar", "imagenet1k-validation-00.tar", "train.csv"):
        (tmp_path / name).touch()
    notes: list[str] = []
    assert _names(find_shards(f"{tmp_path}/", "train", notes)) == [
        "imagenet1k-train-0000.tar",
        "imagenet1k-train-0001.tar",
    ]
    assert _names(find_shards(str(tmp_path), "eval", notes)) == ["imagenet1k-validation-00.tar"]
    assert notes == [
        f"data.train: the 2 of {tmp_path}/ that are named train (left out: 1 named val)",
        f"data.eval: the 1 of {tmp_path} that are named val (left out: 2 named train)",
    ]
    assert len(shard_set(str(tmp_path)).shards) == 3 and shard_set(str(tmp_path)).splits == ["train", "train", "eval"]
    assert _names(shard_set(str(tmp_path), "eval").shards) == ["imagenet1k-validation-00.tar"]


def test_a_folder_that_is_being_made_is_no_data_set(tmp_path):
    (tmp_path / "train-000000.tar").touch()
    (tmp_path / "dataset.unfinished").mkdir()
    with pytest.raises(UserError, match="whose shards are not all made: run its `fastvit data make` again to the end"):
        find_shards(str(tmp_path), "train")
    assert _names(find_shards(f"{tmp_path}/*.tar", "train")) == ["train-000000.tar"]


def test_the_patterns_that_a_refusal_gives_are_taken(tmp_path):
    for name in ("train-0.tar", "train-1.tar", "val-0.tar", "extra-0.tar", "extra-1.tar"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="holds shards of several kinds: set data.train to") as error:
        find_shards(str(tmp_path), "train")
    patterns = re.findall(r"'([^']+)'", str(error.value))
    found = [_names(find_shards(f"{tmp_path}/{pattern}", "train")) for pattern in patterns]
    assert found == [["train-0.tar", "train-1.tar"], ["val-0.tar"], ["extra-0.tar", "extra-1.tar"]]


# ---- a data set that was copied into an object store


@pytest.fixture
def copied(made, s3_bucket) -> Iterator[str]:
    for path in made.iterdir():
        s3_bucket.pipe_file(f"bucket/copied/set/{path.name}", path.read_bytes())
    yield "s3://bucket/copied/set"
    s3_bucket.rm("bucket/copied/")


@pytest.mark.parametrize("end", ["", "/"])
def test_a_remote_folder_with_dataset_json_gives_the_split_only(copied, end):
    assert find_shards(copied + end, "train") == [f"{copied}/train-000000.tar", f"{copied}/train-000001.tar"]
    assert find_shards(copied + end, "eval") == [f"{copied}/eval-000000.tar"]
    assert info_beside(find_shards(copied, "eval")).classes == ["ant", "bee"]
    assert shard_set(copied, "eval").class_names == ["ant", "bee"]
    assert shard_set(copied).splits == ["train", "train", "eval"]


def test_a_remote_folder_without_one_gives_the_shards_that_are_named_so(copied, s3_bucket):
    s3_bucket.rm("bucket/copied/set/dataset.json")
    assert find_shards(copied, "train") == [f"{copied}/train-000000.tar", f"{copied}/train-000001.tar"]
    assert find_shards(copied, "eval") == [f"{copied}/eval-000000.tar"]
    assert info_beside(find_shards(copied, "eval")) is None


# ---- commands


@pytest.mark.parametrize(
    "line",
    [
        "pipe:touch pwned",
        "  pipe:touch pwned; cat {a,b}.tar",
        "p{ipe:touch pwned,ipe:x.tar}",
        "{pipe:touch pwned,x.tar}",
    ],
)
def test_a_list_names_no_command(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    Path("x.tar").touch()
    Path("list.txt").write_text(f"x.tar\n{line}\n")
    for argument in ("@list.txt", "@./list.txt"):
        with pytest.raises(UserError) as error:
            find_shards(argument, "train")
        assert "list.txt, which names the command 'pipe:touch pwned" in str(error.value)
    assert not Path("pwned").exists()


def test_the_advice_about_a_command_in_a_list_helps(tmp_path):
    (tmp_path / "list.txt").write_text("pipe:cat x.tar\n")
    message = "a command runs only if it is given on the command line or in a recipe; give it there, or name a path"
    with pytest.raises(UserError, match=message):
        find_shards(f"@{tmp_path}/list.txt", "train")
    assert find_shards("pipe:cat x.tar", "train") == ["pipe:cat x.tar"]


def test_a_file_whose_name_looks_like_a_command_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pipe:touch pwned;.tar").touch()
    for pattern in (".", "*.tar", "p*.tar", "./"):
        assert find_shards(pattern, "train") == ["./pipe:touch pwned;.tar"]
        assert shard_set(pattern).shards == ["./pipe:touch pwned;.tar"]


def test_dataset_json_names_no_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shards = {"samples": 1, "shards": {"pipe:touch pwned": 1}}
    Path("dataset.json").write_text(json.dumps(INFO | {"train": shards, "eval": shards}))
    assert find_shards(".", "train") == shard_set(".", "train").shards == ["./pipe:touch pwned"]
