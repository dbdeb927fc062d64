"""What `fastvit data make` takes people's layouts for: the exact splits and classes, or the exact refusal."""

import io
import re
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvit_engine.cli import main
from fastvit_engine.data.build.make import make_dataset
from fastvit_engine.data.build.sources import list_source, recognise
from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.errors import UserError
from fastvit_engine.observe.progress import WorkProgress

Found = tuple[dict[str, str], dict[str, str]]  # class of each image to train on, and to evaluate on


@pytest.fixture
def source(tmp_path, photo) -> Callable[[str], Path]:
    """source("train/cat/1.jpg test/") -> a folder with these images (of other names, empty files) and empty folders"""

    def build(names: str) -> Path:
        for name in names.split():
            path = tmp_path / "in" / name.replace("%", " ")
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                path.mkdir(exist_ok=True)
            else:
                path.write_bytes(photo(len(name)) if name.lower().endswith((".jpg", ".jpeg")) else b"")
        return tmp_path / "in"

    return build


@pytest.fixture
def listed(tmp_path) -> Callable[..., Found]:
    def run(path: Path | str, format: str | None = None, **options) -> Found:
        context = Context(
            tmp_path / "scratch", 1, WorkProgress(quiet=True), lambda text: None, source=str(path), **options
        )
        listing = list_source(str(path), format, context)
        run.left_out, run.clauses = listing.left_out, context.left_out
        found: Found = ({}, {})
        for index in range(len(listing)):
            (label,) = listing.labels_of(index)
            found[int(listing.held_out[index])][listing.name(index)] = listing.classes[label]
        assert sum(map(len, found)) == len(listing)
        return found

    return run


def _classes(*names: str) -> dict[str, str]:
    return {name: name.partition("/")[0] for name in names}


PLAIN = [
    ("cat/1.jpg dog/2.jpg", ["cat/1.jpg", "dog/2.jpg"], []),
    ("training%shoes/1.jpg test%tube/1.jpg", ["training shoes/1.jpg", "test tube/1.jpg"], []),
    ("n01/1.jpg", ["n01/1.jpg"], []),
    ("cat/raw/1.jpg cat/2.jpg dog/2.jpg", ["cat/raw/1.jpg", "cat/2.jpg", "dog/2.jpg"], []),
    ("aves/kite/1.jpg aves/owl/1.jpg fish/cod/1.jpg", ["aves/kite/1.jpg", "aves/owl/1.jpg", "fish/cod/1.jpg"], []),
    ("__MACOSX/cat/._1.jpg __MACOSX/1.jpg cat/1.jpg dog/1.jpg", ["cat/1.jpg", "dog/1.jpg"], []),
    ("cat/@eaDir/1.jpg cat/1.jpg .ipynb_checkpoints/x.jpg lost+found/ dog/1.jpg", ["cat/1.jpg", "dog/1.jpg"], []),
    ("train/cat/1.jpg train/dog/1.jpg", ["cat/1.jpg", "dog/1.jpg"], []),
    (
        "train/cat/1.jpg train/dog/1.jpg val/cat/7.jpg val/dog/8.jpg",
        ["cat/1.jpg", "dog/1.jpg"],
        ["cat/7.jpg", "dog/8.jpg"],
    ),
    (
        "train/cat/1.jpg train/dog/1.jpg val/cat/7.jpg val/dog/8.jpg test/cat/9.jpg test/dog/9.jpg",
        ["cat/1.jpg", "dog/1.jpg"],
        ["cat/7.jpg", "dog/8.jpg"],
    ),
    (
        "train/cat/1.jpg train/dog/1.jpg test/cat/7.jpg test/dog/8.jpg",
        ["cat/1.jpg", "dog/1.jpg"],
        ["cat/7.jpg", "dog/8.jpg"],
    ),
    ("train/cat/1.jpg train/dog/1.jpg test/1.jpg test/2.jpg", ["cat/1.jpg", "dog/1.jpg"], []),
    ("Training/cat/1.jpg Training/dog/1.jpg Testing/dog/8.jpg", ["cat/1.jpg", "dog/1.jpg"], ["dog/8.jpg"]),
    (
        "training_set/training_set/cat/1.jpg training_set/training_set/dog/1.jpg test_set/test_set/cat/2.jpg",
        ["cat/1.jpg", "dog/1.jpg"],
        ["cat/2.jpg"],
    ),
    (
        "seg_train/seg_train/a/1.jpg seg_train/seg_train/b/1.jpg seg_test/seg_test/a/2.jpg",
        ["a/1.jpg", "b/1.jpg"],
        ["a/2.jpg"],
    ),
    (
        "train.X1/n01/1.jpg train.X2/n02/2.jpg val.X/n01/3.jpg val.X/n02/4.jpg",
        ["n01/1.jpg", "n02/2.jpg"],
        ["n01/3.jpg", "n02/4.jpg"],
    ),
    ("train/test/1.jpg train/cat/2.jpg val/test/3.jpg", ["test/1.jpg", "cat/2.jpg"], ["test/3.jpg"]),
    ("train/n01/images/1.jpg train/n02/images/2.jpg val/images/3.jpg", ["n01/images/1.jpg", "n02/images/2.jpg"], []),
    ("train/cat/1.jpg train/dog/2.jpg val/cat/3.jpg annotations/cat/1.xml", ["cat/1.jpg", "dog/2.jpg"], ["cat/3.jpg"]),
]


@pytest.mark.parametrize(("names", "train", "held_out"), PLAIN)
def test_folders(source, listed, names, train, held_out):
    path = source(names)
    assert listed(path) == (_classes(*train), _classes(*held_out))
    assert recognise(str(path)) == "folder"


# A tar with the images of one folder is a flat one.
@pytest.mark.parametrize(("names", "train", "held_out"), [case for case in PLAIN if case[0] != "n01/1.jpg"])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_tar_of_a_folder_is_read_as_the_folder(source, listed, tmp_path, names, train, held_out, ending):
    with tarfile.open(tmp_path / f"in{ending}", "w:gz" if ending.endswith("gz") else "w") as tar:
        tar.add(source(names), arcname="photos")
    assert recognise(str(tmp_path / f"in{ending}")) == "folder-tar"
    assert listed(tmp_path / f"in{ending}") == (_classes(*train), _classes(*held_out))


# names, the two readings, and for each of the two commands what it gives: images to train and to evaluate on
TWO_READINGS = [
    (
        "ant/1.jpg bee/2.jpg test/3.jpg",
        "'test' as classes like 'ant' and 'bee'",
        (["ant/1.jpg", "bee/2.jpg", "test/3.jpg"], []),
        (["ant/1.jpg", "bee/2.jpg"], []),
    ),
    (
        "ant/1.jpg bee/2.jpg test/ant/3.jpg",
        "'test' as splits, to be left out",
        (["ant/1.jpg", "bee/2.jpg", "test/ant/3.jpg"], []),
        (["ant/1.jpg", "bee/2.jpg"], []),
    ),
    (
        "train/cat/1.jpg train/dog/2.jpg val/cat/3.jpg extra/cat/9.jpg",
        "'train' and 'val' as splits of class folders",
        (["cat/1.jpg", "dog/2.jpg"], ["cat/3.jpg"]),
        (["train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "extra/cat/9.jpg"], []),
    ),
    (
        "birds-train/kite/1.jpg birds-train/owl/2.jpg birds-test/owl/3.jpg",
        "as splits of class folders",
        (["kite/1.jpg", "owl/2.jpg"], ["owl/3.jpg"]),
        (["birds-train/kite/1.jpg", "birds-train/owl/2.jpg", "birds-test/owl/3.jpg"], []),
    ),
    (
        "train_cat/1.jpg train_dog/2.jpg test_cat/3.jpg",
        "'test_cat' as images that are not to be trained on",
        (["train_cat/1.jpg", "train_dog/2.jpg", "test_cat/3.jpg"], []),
        (["train_cat/1.jpg", "train_dog/2.jpg"], []),
    ),
    (
        "cat/train/1.jpg cat/test/2.jpg dog/train/3.jpg dog/test/4.jpg",
        "it as a split",
        (["cat/train/1.jpg", "cat/test/2.jpg", "dog/train/3.jpg", "dog/test/4.jpg"], []),
        (["cat/train/1.jpg", "dog/train/3.jpg"], []),
    ),
    (
        "photos/cat/1.jpg photos/dog/2.jpg",
        "'photos' as a class",
        (["photos/cat/1.jpg", "photos/dog/2.jpg"], []),
        (["cat/1.jpg", "dog/2.jpg"], []),
    ),
    (
        "fold1/cat/1.jpg fold1/dog/2.jpg fold2/cat/3.jpg fold2/dog/4.jpg",
        "'fold1' and 'fold2' as classes",
        (["fold1/cat/1.jpg", "fold1/dog/2.jpg", "fold2/cat/3.jpg", "fold2/dog/4.jpg"], []),
        (["cat/1.jpg", "dog/2.jpg"], []),
    ),
    (
        "data/train/cat/1.jpg data/train/dog/2.jpg data/val/cat/3.jpg",
        "'data' as a class",
        (["data/train/cat/1.jpg", "data/train/dog/2.jpg", "data/val/cat/3.jpg"], []),
        (["cat/1.jpg", "dog/2.jpg"], ["cat/3.jpg"]),
    ),
    (
        "train/cat/1.jpg train/dog/2.jpg train/val/cat/3.jpg",
        "'train/val' as images to train on",
        (["cat/1.jpg", "dog/2.jpg", "val/cat/3.jpg"], []),
        (["cat/1.jpg", "dog/2.jpg"], []),
    ),
    (
        "train/cat/1.jpg train/dog/2.jpg train/cat/test/3.jpg val/cat/4.jpg",
        "'train/cat/test' as images to train on",
        (["cat/1.jpg", "dog/2.jpg", "cat/test/3.jpg"], ["cat/4.jpg"]),
        (["cat/1.jpg", "dog/2.jpg"], ["cat/4.jpg"]),
    ),
    (
        "train_large/cat/1.jpg train_large/dog/2.jpg val/cat/3.jpg",
        "'val' as splits of class folders",
        (["cat/1.jpg", "dog/2.jpg"], ["cat/3.jpg"]),
        (["train_large/cat/1.jpg", "train_large/dog/2.jpg", "val/cat/3.jpg"], []),
    ),
    (
        "asl_train/asl_train/a/1.jpg asl_train/asl_train/b/2.jpg asl_test/asl_test/3.jpg",
        "as splits of class folders",
        (["a/1.jpg", "b/2.jpg"], []),
        (["asl_train/asl_train/a/1.jpg", "asl_train/asl_train/b/2.jpg", "asl_test/asl_test/3.jpg"], []),
    ),
    (
        "images/cat/1.jpg images/dog/2.jpg segmentations/cat/1.jpg",
        "the folders of 'images' as classes",
        (["cat/1.jpg", "dog/2.jpg"], []),
        (["images/cat/1.jpg", "images/dog/2.jpg", "segmentations/cat/1.jpg"], []),
    ),
    (
        "val/cat/1.jpg val/dog/2.jpg",
        "'val' as a folder of classes",
        (["cat/1.jpg", "dog/2.jpg"], []),
        (["val/cat/1.jpg", "val/dog/2.jpg"], []),
    ),
    (
        "train/all/cat/1.jpg train/all/dog/2.jpg val/all/cat/3.jpg",
        "'all' as the only class",
        (["all/cat/1.jpg", "all/dog/2.jpg"], ["all/cat/3.jpg"]),
        (["cat/1.jpg", "dog/2.jpg"], []),
    ),
]


def _commands(message: str) -> list[list[str]]:
    return [shlex.split(command) for command in re.findall(r"`(fastvit [^`]+)`", message)]


def _follow(listed, command: list[str]) -> Found:
    """What the source of a command line is taken for."""
    words = command[3:]
    assert command[:3] == ["fastvit", "data", "make"] and words[-2:] == ["--out", "DIR"]
    options = list(zip(words[1::2], words[2::2], strict=True))
    assert {name for name, _ in options} <= {"--format", "--leave-out", "--out"}
    leave_out = [value for name, value in options if name == "--leave-out"]
    return listed(words[0], dict(options).get("--format"), leave_out=leave_out)


@pytest.mark.parametrize(("names", "reading", "first", "second"), TWO_READINGS)
def test_two_readings_are_refused_with_commands_that_work(source, listed, names, reading, first, second):
    path = source(names)
    with pytest.raises(UserError) as error:
        listed(path)
    assert str(error.value).startswith(f"{path} can be read in two ways, with ") and reading in str(error.value)
    commands = _commands(str(error.value))
    assert len(commands) == 2 and "\n" not in str(error.value)
    for command, (train, held_out) in zip(commands, (first, second), strict=True):
        assert _follow(listed, command) == (_classes(*train), _classes(*held_out))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            "train/1.jpg train/2.jpg test/3.jpg",
            r"the 2 images in .*in/train are in no class folders: put those of each",
        ),
        ("train/cat/1.jpg val/cat/2.jpg val/emu/3.jpg", r"the class 'emu' is in .*in/val and not among the 1 class to"),
        ("train/cat/1.jpg train/dog/", r"class folder .*in/train/dog holds no image"),
        ("cat/1.jpg dog/notes.txt", r"class folder .*in/dog holds no image"),
        ("images/1.jpg annotations/1.xml", r"with a list of the images and their labels: `fastvit data make LIST.csv "),
        ("1.jpg 2.jpg", r"folder .*in has no sub-folders \(2 images in .*in itself\): put the images of each class"),
        ("train/0.tar train/1.tar val/0.tar", r"the tars of .*in are in folders, such as train/: name all as"),
    ],
)
def test_what_fits_nothing(source, listed, names, message):
    with pytest.raises(UserError, match=message):
        listed(source(names))


def test_a_class_of_the_eval_split_alone_can_be_left_out(source, listed):
    path = source("train/cat/1.jpg val/cat/2.jpg val/emu/3.jpg")
    with pytest.raises(UserError) as error:
        listed(path)
    (command,) = _commands(str(error.value))
    assert _follow(listed, command) == ({"cat/1.jpg": "cat"}, {"cat/2.jpg": "cat"})


@pytest.mark.parametrize("held_out", ["in", "in/train", "in/train/../train"])
def test_an_eval_source_that_is_trained_on(source, tmp_path, held_out):
    path = source("train/cat/1.jpg train/dog/2.jpg val/cat/3.jpg")
    arguments = {"eval_source": str(tmp_path / held_out), "workers": 1, "progress": lambda line: None}
    message = (
        "has an eval split of its own" if held_out == "in" else r"has .*/1\.jpg, which is among the images to train"
    )
    with pytest.raises(UserError, match=message):
        make_dataset(str(path / "train"), tmp_path / "out", **arguments)
    made = make_dataset(str(path / "train"), tmp_path / "out", **{**arguments, "eval_source": str(path / "val")})
    assert (made.info.train.samples, made.info.eval.samples) == (2, 1)


def test_an_eval_source_that_is_the_same_tar(tmp_path, photo):
    _tar(tmp_path / "a.tar", {"1.jpg": photo(1), "1.cls": b"0", "2.jpg": photo(2), "2.cls": b"1"})
    (tmp_path / "b.tar").symlink_to(tmp_path / "a.tar")
    with pytest.raises(UserError, match=r"has .*a\.tar, which is among the images to train on"):
        make_dataset(str(tmp_path / "a.tar"), tmp_path / "out", eval_source=str(tmp_path / "b.tar"), workers=1)


def test_leave_out_that_matches_nothing_or_cannot_act(source, listed, tmp_path):
    with pytest.raises(UserError, match="--leave-out is 'tset', which is nothing in"):
        listed(source("cat/1.jpg"), leave_out=["tset"])
    (tmp_path / "list.csv").write_text("path,label\nin/cat/1.jpg,cat\n")
    with pytest.raises(UserError, match="--leave-out is for folders"):
        listed(tmp_path / "list.csv", leave_out=["x"])


def test_links_in_a_circle_end(source, listed):
    path = source("cat/1.jpg dog/2.jpg")
    (path / "cat" / "up").symlink_to(path)
    (path / "cat" / "self").symlink_to(path / "cat")
    assert listed(path) == (_classes("cat/1.jpg", "dog/2.jpg"), {})
    assert listed.left_out == {"link to a folder around it": 2}


# ---- ImageNet as Kaggle packs it

KAGGLE = (
    "ILSVRC/Data/CLS-LOC/train/n01/n01_1.JPEG ILSVRC/Data/CLS-LOC/train/n02/n02_1.JPEG "
    "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000002.JPEG "
    "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG ILSVRC/Annotations/CLS-LOC/val/x.xml"
)
KAGGLE_TRAIN = _classes("n01/n01_1.JPEG", "n02/n02_1.JPEG")
SOLUTION = (
    "ImageId,PredictionString\nILSVRC2012_val_00000002,n01 1 2 3 4 n01 5 6 7 8\nILSVRC2012_val_00000001,n02 1 2 3 4\n"
)


@pytest.mark.parametrize("below", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_imagenet_of_kaggle(source, listed, below):
    path = source(KAGGLE) / below
    assert recognise(str(path)) == "imagenet"
    assert listed(path) == (KAGGLE_TRAIN, {})
    without = "image in val/ (no LOC_val_solution.csv, which has the labels)"
    assert listed.left_out == {"image in test/ (no labels)": 1, without: 2}
    (source("") / "LOC_val_solution.csv").write_text(SOLUTION)
    held_out = {"ILSVRC2012_val_00000001.JPEG": "n02", "ILSVRC2012_val_00000002.JPEG": "n01"}
    assert listed(path) == (KAGGLE_TRAIN, held_out)
    assert listed.left_out == {"image in test/ (no labels)": 1}
    (source("") / "LOC_val_solution.csv").write_text(SOLUTION.partition("ILSVRC2012_val_00000001")[0])
    with pytest.raises(UserError, match=r"has no label for ILSVRC2012_val_00000001\.JPEG of"):
        listed(path)
    (source("") / "LOC_val_solution.csv").write_text("<html>")
    with pytest.raises(UserError, match=r"cannot be read as ImageId,PredictionString"):
        listed(path)


def test_imagenet_of_kaggle_with_sorted_validation_images(source, listed):
    path = source("Data/CLS-LOC/train/n01/a.JPEG Data/CLS-LOC/train/n02/b.JPEG Data/CLS-LOC/val/n01/c.JPEG")
    assert listed(path) == (_classes("n01/a.JPEG", "n02/b.JPEG"), _classes("n01/c.JPEG"))


# ---- tars


def _tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _shard(path: Path, key: str, photo, label: bytes = b"1") -> None:
    _tar(path, {f"{key}.jpg": photo(1), f"{key}.cls": label})


def test_shards_are_split_by_their_names(listed, tmp_path, photo):
    for name in ("imagenet1k-train-0000", "imagenet1k-train-0001", "imagenet1k-validation-00"):
        _shard(tmp_path / "in" / f"{name}.tar", name, photo)
    train = dict.fromkeys(("imagenet1k-train-0000", "imagenet1k-train-0001"), "1")
    assert listed(tmp_path / "in") == (train, {"imagenet1k-validation-00": "1"})
    assert listed(f"{tmp_path}/in/*.tar") == (train, {"imagenet1k-validation-00": "1"})
    assert listed(f"{tmp_path}/in/*-train-*.tar") == (train, {})


def test_shards_are_split_by_their_folders(listed, tmp_path, photo):
    for name in ("train/0", "train/1", "val/0", "test/0"):
        _shard(tmp_path / "in" / f"{name}.tar", name.replace("/", "-"), photo)
    with pytest.raises(UserError) as error:
        listed(tmp_path / "in")
    pattern = re.search(r"name all as '(.+)'$", str(error.value))[1]
    assert listed(pattern) == ({"train-0": "1", "train-1": "1"}, {"val-0": "1"})


def test_shards_of_which_some_say_a_split(listed, tmp_path, photo):
    for name in ("train-0", "val-0", "part-0", "part-1"):
        _shard(tmp_path / "in" / f"{name}.tar", name, photo)
    with pytest.raises(UserError, match="some shards in .* are named by a split, and others, such as part-0.tar, are"):
        listed(tmp_path / "in")
    with pytest.raises(UserError) as error:
        listed(tmp_path / "in")
    first, second = _commands(str(error.value))
    assert first[4:6] == second[4:6] == ["--eval-source", f"{tmp_path}/in/val-0.tar"]
    assert listed(first[3]) == ({"train-0": "1"}, {})
    assert listed(second[3]) == ({"train-0": "1", "part-0": "1", "part-1": "1"}, {})


def test_shards_named_for_evaluation_only(listed, tmp_path, photo):
    for name in ("val-0", "test-0"):
        _shard(tmp_path / "in" / f"{name}.tar", name, photo)
    with pytest.raises(UserError, match="are named val and test, and none is named train: name those to train on") as e:
        listed(tmp_path / "in")
    both, alone = _commands(str(e.value))
    assert both[3:6] == [f"{tmp_path}/in/val-0.tar", "--eval-source", f"{tmp_path}/in/test-0.tar"]
    assert _follow(listed, alone) == ({"val-0": "1"}, {})


def test_class_folders_with_a_tar_beside_them(source, listed, photo):
    path = source("cat/1.jpg dog/2.jpg")
    _shard(path / "backup.tar", "s", photo)
    with pytest.raises(UserError, match=r"holds tars and folders of images: choose with `") as error:
        listed(path)
    first, second = _commands(str(error.value))
    assert _follow(listed, first) == ({"s": "1"}, {})
    assert _follow(listed, second) == (_classes("cat/1.jpg", "dog/2.jpg"), {})
    assert listed.left_out == {".tar file": 1}


def test_shards_of_img2dataset_without_labels(listed, tmp_path, photo):
    members = {"0.jpg": photo(1), "0.txt": b"a cat", "0.json": b'{"caption": "a cat", "kind": "cat"}'}
    _tar(tmp_path / "in" / "00000.tar", members)
    for name in ("00000.parquet", "00000_stats.json"):
        (tmp_path / "in" / name).write_bytes(b"x")
    assert recognise(str(tmp_path / "in")) == "webdataset"
    with pytest.raises(UserError, match=r"only jpg, json, txt \(json: caption, kind\): .* --labels json\.FIELD"):
        listed(tmp_path / "in")
    assert listed(tmp_path / "in", labels="json.kind") == ({"0": "cat"}, {})


def test_tars_beside_parquet_files(tmp_path, photo, listed):
    _shard(tmp_path / "in" / "a.tar", "s", photo)
    (tmp_path / "in" / "b.parquet").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"holds Parquet files and tars: choose with `fastvit data make .*--format parquet"
    ):
        listed(tmp_path / "in")
    assert listed(tmp_path / "in", "webdataset") == ({"s": "1"}, {})


def test_tars_of_class_folders_that_are_splits(listed, tmp_path, photo):
    _tar(tmp_path / "in" / "train.tar", {"cat/1.jpg": photo(1), "dog/2.jpg": photo(2)})
    _tar(tmp_path / "in" / "val.tar", {"cat/3.jpg": photo(3)})
    with pytest.raises(UserError, match=r"can be read in two ways: with train.tar, val.tar as classes") as error:
        listed(tmp_path / "in")
    as_classes, as_splits = _commands(str(error.value))
    assert set(_follow(listed, as_classes)[0].values()) == {"train", "val"}
    assert main([*as_splits[1:-1], str(tmp_path / "out"), "--workers", "1"]) == 0
    train, held_out = (list(read_shard(f"{tmp_path}/out/{split}-000000.tar")) for split in ("train", "eval"))
    assert {s["jpg"] for s in train} == {photo(1), photo(2)} and [s["jpg"] for s in held_out] == [photo(3)]


def test_a_class_tar_whose_name_may_be_a_split(listed, tmp_path, photo):
    for name in ("bus", "train", "car"):
        _tar(tmp_path / "in" / f"{name}.tar", {f"{name}_1.jpg": photo(1)})
    with pytest.raises(UserError, match="can be read in two ways: with train.tar as classes") as error:
        listed(tmp_path / "in")
    as_classes, left_out = _commands(str(error.value))
    assert set(_follow(listed, as_classes)[0].values()) == {"bus", "car", "train"}
    assert set(_follow(listed, left_out)[0].values()) == {"bus", "car"}


def test_tars_with_several_classes_in_each(listed, tmp_path, photo):
    for part in ("images_1", "images_2"):
        _tar(tmp_path / "in" / f"{part}.tar", {f"cat/{part}.jpg": photo(1), f"dog/{part}.jpg": photo(2)})
    with pytest.raises(
        UserError, match=r"the tar images_1\.tar in .* has images in several folders, such as cat/"
    ) as error:
        listed(tmp_path / "in")
    by_folder, by_tar = _commands(str(error.value))
    assert set(_follow(listed, by_folder)[0].values()) == {"cat", "dog"}
    assert set(_follow(listed, by_tar)[0].values()) == {"images_1", "images_2"}


def test_one_folder_beside_a_list_is_hardly_one_class(source, listed, tmp_path):
    path = source("train.csv test.csv images_png/1.jpg images_png/2.jpg")
    with pytest.raises(UserError, match="can be read in two ways, with a list of the images and their labels") as error:
        listed(path)
    by_list, by_folder = _commands(str(error.value))
    assert by_list[3] == f"{path}/LIST.csv"
    assert set(_follow(listed, by_folder)[0].values()) == {"images_png"}
    assert listed(source("meta.csv cat/1.jpg dog/2.jpg images_png/1.jpg"))[0]["cat/1.jpg"] == "cat"


def test_spaces_tell_class_folders_apart(tmp_path, listed, photo):
    for name in (" ant", "ant", "ant "):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.jpg").write_bytes(photo(1))
    found, _ = listed(tmp_path / "in")
    assert found == {" ant/1.jpg": " ant", "ant/1.jpg": "ant", "ant /1.jpg": "ant "}


# ---- what is said


def test_one_line_says_what_a_source_was_taken_for(source, tmp_path):
    path = source(
        "train/cat/1.jpg train/dog/2.jpg train/dog/3.jpg val/cat/4.jpg test/cat/5.jpg test/dog/6.jpg train/7.jpg "
        "__MACOSX/x.jpg train/cat/notes.txt"
    )
    lines: list[str] = []
    made = make_dataset(str(path), tmp_path / "out", workers=1, progress=lines.append)
    assert lines[0] == (
        f"{path}: a folder of splits, 'train' (train) and 'val' (eval): 3 images to train on, 1 image to evaluate on; "
        "2 class names in alphabetical order: cat, dog; left out: 1 .txt file, 1 folder called '__MACOSX', 2 images in "
        "test/ (there is a validation split) and 1 image in train/ beside the class folders; no eval image of 'dog'"
    )
    assert "1 folder called '__MACOSX'" in lines[-1] and made.info.left_out["folder called '__MACOSX'"] == 1
    assert made.info.train.samples == 3 and made.info.eval.samples == 1


def test_leaving_out_is_an_option_of_the_command(source, tmp_path, capsys):
    path = source("ant/1.jpg bee/2.jpg test/3.jpg")
    assert main(["data", "make", str(path), "--out", str(tmp_path / "out"), "--eval-fraction", "0"]) == 2
    first, second = _commands(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    for number, command in enumerate((first, second)):
        assert command[-1] == str(tmp_path / "out")
        arguments = [*command[1:-1], str(tmp_path / f"out{number}"), "--eval-fraction", "0", "--workers", "1"]
        assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "3 class names in alphabetical order: ant, bee, test" in said
    assert "2 class names in alphabetical order: ant, bee; left out: 1 folder called 'test'\n" in said
