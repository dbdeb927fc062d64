"""Data sets as their authors publish them: tiny ones of the same layout, with the oddities of the real ones."""

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit_engine.api import evaluate
from fastvit_engine.config import Config, ModelConfig
from fastvit_engine.data.build.make import make_dataset
from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.data.shards.names import DatasetInfo, find_shards
from fastvit_engine.errors import UserError
from fastvit_engine.models.from_config import build_model
from fastvit_engine.unpack import unpack

savemat = pytest.importorskip("scipy.io").savemat


class Made(NamedTuple):
    """A data set that has been made."""

    info: DatasetInfo
    lines: list[str]  # what the command said
    train: dict[str, str]  # name in the key of each sample -> name of its class
    eval: dict[str, str]
    folder: Path


@pytest.fixture
def make(tmp_path) -> Callable[..., Made]:
    """make(source, **options) -> a data set; refuses as the command does"""
    count = iter(range(100))

    def run(source: Path, **options) -> Made:
        out, lines = tmp_path / f"out-{next(count)}", list[str]()
        info = make_dataset(str(source), out, progress=lines.append, **{"workers": 1, "samples_per_shard": 4} | options)
        assert info.info is not None
        samples = {
            split: _samples(out, split) if getattr(info.info, split).shards else [] for split in ("train", "eval")
        }
        train, evaluation = (
            {_name(s): info.info.classes[int(s["cls"])] for s in samples[split]} for split in ("train", "eval")
        )
        return Made(info.info, lines, train, evaluation, out)

    return run


def _samples(folder: Path, split: str) -> list[dict]:
    return [sample for shard in find_shards(str(folder), split) for sample in read_shard(shard)]


def _name(sample: dict) -> str:
    return sample["__key__"].partition("_")[2]


def _contents(made: Made) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in made.folder.glob("*.tar")}


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _pack(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _refused(run: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Oxford-IIIT Pets

TRAINVAL = b"Abyssinian_1 1 1 1\nAbyssinian_34 1 1 1\nBengal_2 3 1 2\namerican_bulldog_7 2 2 1\n"
TEST = b"Abyssinian_5 1 1 1\nBengal_4 3 1 2\nBengal_6 3 1 2\namerican_bulldog_8 2 2 1\n"
PETS_TRAIN = {"Abyssinian_1": "Abyssinian", "Abyssinian_34": "Abyssinian", "Bengal_2": "Bengal"}
PETS_TRAIN |= {"american_bulldog_7": "american_bulldog"}
PETS_TEST = {"Abyssinian_5": "Abyssinian", "Bengal_4": "Bengal", "Bengal_6": "Bengal"}
PETS_TEST |= {"american_bulldog_8": "american_bulldog"}


@pytest.fixture
def pets(photo, encode) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files of images.tar.gz and of annotations.tar.gz."""
    names = [*PETS_TRAIN, *PETS_TEST, "Egyptian_Mau_139"]  # which no list names
    images = {f"images/{name}.jpg": photo(number) for number, name in enumerate(names)}
    images["images/Abyssinian_34.jpg"] = encode(np.zeros((5, 6, 3), np.uint8), "GIF")  # as Egyptian_Mau_* are in truth
    images |= {"images/Abyssinian_100.mat": b"MATLAB 5.0", "images/Abyssinian_101.mat": b"MATLAB 5.0"}
    trimap = encode(np.ones((30, 40), np.uint8), "PNG")
    annotations = {
        "annotations/README": b"about",
        "annotations/._trainval.txt": b"\0\5\x16\7",
        "annotations/test.txt": TEST,
    }
    annotations |= {"annotations/list.txt": b"#Image CLASS-ID SPECIES BREED ID\n" + TRAINVAL + TEST}
    annotations |= {f"annotations/trimaps/{name}.png": trimap for name in names}
    annotations |= {"annotations/trimaps/._Bengal_2.png": b"\0\5\x16\7", "annotations/trainval.txt": TRAINVAL}
    annotations |= {"annotations/xmls/Bengal_2.xml": b"<annotation/>"}
    return images, annotations


@pytest.fixture
def packed_pets(tmp_path, pets) -> Path:
    _pack(tmp_path / "pets" / "images.tar.gz", pets[0])
    _pack(tmp_path / "pets" / "annotations.tar.gz", pets[1])
    return tmp_path / "pets"


def test_pets_from_the_archives_have_the_classes_and_splits_of_the_lists(make, packed_pets, pets):
    made = make(packed_pets)
    assert made.info.classes == ["Abyssinian", "american_bulldog", "Bengal"]  # by class number, not by name
    assert (made.train, made.eval) == (PETS_TRAIN, PETS_TEST)
    assert made.info.eval_fraction is None
    assert made.info.left_out == {".mat file": 2, "image that no list names": 1}
    (taken,) = [line for line in made.lines if "Oxford" in line]
    assert taken.endswith(
        ": Oxford-IIIT Pets, trainval.txt (train) and test.txt (eval): 4 images to train on, 4 images to evaluate on; "
        "3 class names in the given order: Abyssinian, american_bulldog, Bengal; left out: 2 .mat files and 1 image "
        "that no list names"
    )
    assert made.lines[-1].endswith("; left out 2 .mat files and 1 image that no list names")
    images = {_name(sample): sample for split in ("train", "eval") for sample in _samples(made.folder, split)}
    assert images["Bengal_2"]["jpg"] == pets[0]["images/Bengal_2.jpg"]
    assert images["Abyssinian_34"].get("png"), "it is no JPEG, whatever its name is"


def test_pets_are_the_same_bytes_from_archives_and_folders_in_parts_and_again(make, tmp_path, packed_pets, pets):
    first = make(packed_pets)
    for files in pets:
        _write(tmp_path / "unpacked", files)
    unpacked = make(tmp_path / "unpacked")
    assert _contents(make(packed_pets)) == _contents(first) == _contents(unpacked)
    assert unpacked.info.left_out == first.info.left_out
    for part in ((1, 2), (2, 2)):
        made = make_dataset(
            str(packed_pets), tmp_path / "parts", samples_per_shard=4, workers=1, part=part, progress=lambda line: None
        )
    assert made.info is not None
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts").glob("*.tar")} == _contents(first)


def test_archives_beside_what_they_unpack_to_are_said_to_be_left_out(make, tmp_path, packed_pets, pets):
    _write(packed_pets, pets[0])
    made = make(packed_pets)
    assert "images.tar.gz, since images/ is there" in made.lines[-2]
    assert (made.train, made.eval) == (PETS_TRAIN, PETS_TEST)


def test_a_split_can_be_left_out_to_choose_a_learning_rate_or_only_to_evaluate(make, packed_pets):
    made = make(packed_pets, leave_out=["test"], eval_fraction=0.25)
    assert made.train | made.eval == PETS_TRAIN and len(made.eval) == 1
    assert made.info.left_out["image of the test split"] == 4
    made = make(packed_pets, leave_out=["train"])
    assert (made.train, made.eval) == ({}, PETS_TEST)
    assert ": 4 images to evaluate on, none to train on; 3 class names" in made.lines[-2]
    message = _refused(lambda: make(packed_pets, leave_out=["val"]))
    assert "--leave-out is 'val', which is no split in" in message


def test_a_class_number_that_no_image_of_pets_has_keeps_its_place(make, packed_pets, pets):
    lists = {f"annotations/{name}": text.replace(b"Bengal", b"Sphynx").replace(b" 3 1 2", b" 4 1 3")
             for name, text in {"trainval.txt": TRAINVAL, "test.txt": TEST}.items()}  # fmt: skip
    images = {name.replace("Bengal", "Sphynx"): image for name, image in pets[0].items()}
    _pack(packed_pets / "annotations.tar.gz", pets[1] | lists)
    _pack(packed_pets / "images.tar.gz", images)
    made = make(packed_pets)
    assert made.info.classes == ["Abyssinian", "american_bulldog", "3", "Sphynx"]
    assert {name: label for name, label in made.train.items() if label == "Sphynx"} == {"Sphynx_2": "Sphynx"}
    assert ", 1 of them without an image" in made.lines[-2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            {"annotations/trainval.txt": TRAINVAL + b"Bengal_3 3 1\n"},
            "has the line 'Bengal_3 3 1', which is not NAME CLASS",
        ),
        ({"annotations/trainval.txt": TRAINVAL + b"Bengal_3 0 1 1\n"}, "has the line 'Bengal_3 0 1 1', which is not"),
        (
            {"annotations/trainval.txt": TRAINVAL + b"Bengal_3 2 1 1\n"},
            "give class 2 the names american_bulldog and Bengal",
        ),
        ({"annotations/trainval.txt": TRAINVAL + b"Sphynx_3 3 1 1\n"}, "give class 3 the names Bengal and Sphynx"),
        ({"annotations/test.txt": TEST + b"S" * 9000 + b"_3 3 1 1\n"}, r"the names Bengal and S{200}\.\.\., or the "),
        ({"annotations/test.txt": TEST + b"Bengal_2 3 1 2\n"}, "Bengal_2.jpg of .*images.tar.gz is listed twice"),
        (
            {"annotations/trainval.txt": TRAINVAL + b"Bengal_3 3 1 2\n"},
            "Bengal_3.jpg in .*images.tar.gz is missing: repair it",
        ),
        ({"annotations/test.txt": b"\n"}, "has no test.txt or an empty one: download annotations.tar.gz again"),
        ({"annotations/trainval.txt": b""}, "has no trainval.txt or an empty one"),
        ({"annotations/test.txt": b"\xff\xfe"}, "test.txt of .*annotations.tar.gz is not text"),
    ],
)
def test_damaged_lists_of_pets_are_refused(make, packed_pets, pets, damage, message):
    _pack(packed_pets / "annotations.tar.gz", pets[1] | damage)
    with pytest.raises(UserError, match=message):
        make(packed_pets)


def test_archives_of_pets_that_are_damaged_or_missing_are_refused(make, tmp_path, packed_pets, pets):
    whole = {path.name: path.read_bytes() for path in packed_pets.iterdir()}
    for name, content in whole.items():
        (packed_pets / name).write_bytes(content[: len(content) // 2])
        assert f"{name} " in _refused(lambda: make(packed_pets)), "the archive is named"
        (packed_pets / name).unlink()
        message = _refused(lambda: make(packed_pets, format="pets"))
        folder = name.partition(".")[0]
        assert f"has neither {name} nor the folder {folder} from it: download it, and put it there" in message
        message = _refused(lambda: make(packed_pets))  # what is left may be anything
        assert "can be read in two ways" in message and "--format class-tars" in message
        (packed_pets / name).write_bytes(content)


# ---- Flowers-102

FLOWERS = [3, 1, 2, 2, 1, 3, 3, 2, 1]  # label of each image
SETS = {"trnid": [2, 6, 8], "valid": [5, 3], "tstid": [1, 4, 9]}  # 7 is in none
NUMBERS = {f"image_{number:05d}": str(label) for number, label in enumerate(FLOWERS, 1)}


def _of(*sets: str) -> dict[str, str]:
    return {f"image_{number:05d}": NUMBERS[f"image_{number:05d}"] for name in sets for number in SETS[name]}


@pytest.fixture
def flowers(tmp_path, photo) -> Path:
    folder = tmp_path / "flowers"
    _pack(folder / "102flowers.tgz", {f"jpg/{name}.jpg": photo(number) for number, name in enumerate(NUMBERS)})
    savemat(folder / "imagelabels.mat", {"labels": np.array([FLOWERS], np.uint8)}, do_compression=True)
    splits = {name: np.array([numbers], np.uint16) for name, numbers in SETS.items()}
    savemat(folder / "setid.mat", splits, do_compression=True)
    return folder


def test_flowers_train_on_train_and_val_and_evaluate_on_test(make, flowers):
    made = make(flowers)
    assert made.info.classes == ["1", "2", "3"]
    assert (made.train, made.eval) == (_of("trnid", "valid"), _of("tstid"))
    assert made.info.left_out == {"image that no list names": 1}
    assert (
        ": Flowers-102, train and val (train) and test (eval): 5 images to train on, 3 images to evaluate on; "
        in made.lines[-2]
    )


@pytest.mark.parametrize(
    ("left_out", "train", "evaluation"),
    [(["test"], ["trnid"], ["valid"]), (["val"], ["trnid"], ["tstid"]), (["train", "val"], [], ["tstid"])],
)
def test_other_splits_of_flowers_by_leaving_out_one(make, flowers, left_out, train, evaluation):
    made = make(flowers, leave_out=left_out)
    assert (made.train, made.eval) == (_of(*train), _of(*evaluation))
    for split in left_out:
        assert made.info.left_out[f"image of the {split} split"] == len(
            SETS[{"test": "tstid", "val": "valid"}.get(split, "trnid")]
        )


def test_flowers_unpacked_and_with_names_of_classes(make, flowers, tmp_path):
    first = make(flowers)
    with tarfile.open(flowers / "102flowers.tgz") as tar:
        unpack(tar, flowers)
    (flowers / "102flowers.tgz").unlink()
    (flowers / "segmim").mkdir()
    (flowers / "segmim" / "segmim_00001.jpg").write_bytes(b"a mask")
    (tmp_path / "names.txt").write_text("pink primrose\nball moss\ntiger lily\n")
    made = make(flowers, classes=tmp_path / "names.txt")
    assert _contents(made) == _contents(first)
    assert made.info.classes == ["pink primrose", "ball moss", "tiger lily"]
    (tmp_path / "names.txt").write_text("pink primrose\nball moss\n")
    message = _refused(lambda: make(flowers, classes=tmp_path / "names.txt"))
    assert "has 3 classes, but 2 class names are given: list one for each" in message


@pytest.mark.parametrize("missing", ["102flowers.tgz", "imagelabels.mat", "setid.mat"])
def test_a_missing_file_of_flowers_is_named(make, flowers, missing):
    (flowers / missing).unlink()
    message = _refused(lambda: make(flowers))
    assert missing in message and "download it, and put it there" in message


@pytest.mark.parametrize(
    ("name", "variables", "message"),
    [
        ("imagelabels.mat", {"labels": FLOWERS[:-1]}, "names the image 9 in tstid, and imagelabels.mat has 8 labels"),
        ("imagelabels.mat", {"labels": [0, *FLOWERS[1:]]}, "has labels that are no class numbers from 1"),
        (
            "imagelabels.mat",
            {"labels": [1.5, *FLOWERS[1:]]},
            r"imagelabels.mat cannot be read \(labels has numbers that are not",
        ),
        ("imagelabels.mat", {"others": FLOWERS}, r"imagelabels.mat cannot be read \(it has no variable labels\)"),
        ("setid.mat", SETS | {"valid": [5, 2]}, "image_00002.jpg of .* is listed twice"),
        ("setid.mat", SETS | {"valid": [0]}, "names the image 0 in valid"),
        ("setid.mat", {"trnid": [1], "tstid": [2]}, "no variable valid"),
    ],
)
def test_contradictions_between_the_files_of_flowers_are_refused(make, flowers, name, variables, message):
    savemat(flowers / name, {key: np.array([values]) for key, values in variables.items()})
    with pytest.raises(UserError, match=message):
        make(flowers)


# ---- ObjectNet

IMAGENET = ["tench", "crane", "mitten", "quill, quill pen", "crane", "ballpoint, Biro", "teddy, teddy bear"]  # by index
LINES = [4, 0, 6, 5, 2, 1, 3]  # of each index in imagenet_to_label_2012_v2
LABELS = {
    "winter_glove": "Winter glove",
    "pen": "Pen",
    "toy": "Toy",
    "stuffed_animal": "Stuffed animal",
    "milk": "Milk",
}
MATCHES = {"Winter glove": "mitten", "Pen": "ballpoint, Biro; quill, quill pen", "Stuffed animal": "teddy, teddy bear"}
RED = (255, 0, 0)


@pytest.fixture
def objectnet(tmp_path, encode) -> Path:
    folder = tmp_path / "objectnet-1.0"
    names = [name for _, name in sorted(zip(LINES, IMAGENET, strict=True))]
    mappings = {
        "folder_to_objectnet_label.json": json.dumps(LABELS),
        "objectnet_to_imagenet_1k.json": json.dumps(MATCHES),
        "imagenet_to_label_2012_v2": "".join(f"{name}\n" for name in names),
        "pytorch_to_imagenet_2012_id.json": json.dumps({str(index): line for index, line in enumerate(LINES)}),
    }
    _write(folder / "mappings", {name: text.encode() for name, text in mappings.items()})
    for number, name in enumerate(("pen/a", "pen/b", "winter_glove/c", "stuffed_animal/d", "milk/e", "toy/f", "toy/g")):
        pixels = np.full((12, 14, 3), 20 * number, np.uint8)
        pixels[[0, -1], :] = pixels[:, [0, -1]] = RED
        _write(folder / "images", {f"{name}.png": encode(pixels, "PNG")})
    return folder


def test_objectnet_is_evaluated_on_all_imagenet_classes_that_match(make, objectnet):
    made = make(objectnet)
    assert made.info.classes == [
        "tench",
        "crane (1)",
        "mitten",
        "quill, quill pen",
        "crane (4)",
        "ballpoint, Biro",
        IMAGENET[6],
    ]
    labels = {_name(s): json.loads(s["json"])["labels"] for s in _samples(made.folder, "eval")}
    assert labels == {"a": [5, 3], "b": [5, 3], "c": [2], "d": [6]}
    assert made.info.train.samples == 0 and made.info.eval.samples == 4
    assert made.info.left_out == {"folder of a class that ImageNet lacks": 2, "image of a class that ImageNet lacks": 3}
    what = "2 folders of a class that ImageNet lacks and 3 images of a class that ImageNet lacks"
    assert (
        ": ObjectNet, 3 of its 5 classes, which match 1 to 2 of ImageNet-1k each, without its border" in made.lines[-2]
    )
    assert "4 images to evaluate on, none to train on" in made.lines[-2] and made.lines[-2].endswith(what)
    assert made.lines[-1].endswith(f"; left out {what}")


@pytest.mark.parametrize("resize", [None, 6])
def test_the_border_of_objectnet_is_cut_off(make, objectnet, resize):
    made = make(objectnet, resize=resize)
    for sample in _samples(made.folder, "eval"):
        image = Image.open(io.BytesIO(sample["png" if resize is None else "jpg"]))
        pixels = np.asarray(image)
        assert image.size == ((12, 10) if resize is None else (7, 6))
        assert np.ptp(pixels) <= (0 if resize is None else 2), "nothing red is left, and nothing of it in the rest"


def test_any_of_several_right_classes_counts_as_a_hit(make, objectnet):
    made = make(objectnet)
    labels = {"label_key": "json.labels", "max_labels": 2, "num_workers": 0}
    config = Config.model_validate({"data": labels, "loss": {"kind": "sigmoid"}, "model": {"num_classes": 7}})
    shape = ModelConfig(name="Ti/4", image_size=8, width=32, depth=1, heads=2, num_classes=7)
    model = build_model(shape, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    for predicted, hits in {5: 2, 3: 2, 2: 1, 0: 0}.items():
        with torch.no_grad():
            model.head.bias.copy_(torch.eye(7)[predicted])  # whatever the image: the weights of a new head are 0
        assert evaluate(model, made.folder, config=config).top1 == hits / 4


def test_objectnet_as_the_eval_split_of_other_images(make, objectnet, tmp_path, photo):
    names = [f"n{index:03d}" for index in range(7)]
    _write(tmp_path / "train", {f"{name}/{number}.jpg": photo(number) for number, name in enumerate(names)})
    made = make(tmp_path / "train", eval_source=str(objectnet))
    assert made.info.classes == names and made.info.train.samples == 7
    assert made.eval == {"a": "n005", "b": "n005", "c": "n002", "d": "n006"}
    assert "name it with --eval-source" in _refused(lambda: make(objectnet, eval_source=str(tmp_path / "train")))


def test_what_objectnet_lacks_is_said(make, objectnet, photo):
    shutil.rmtree(objectnet / "images" / "pen")
    _write(objectnet / "images", {"spaceship/1.png": photo(1), "readme.txt": b"", "toy/._f.png": b""})
    made = make(objectnet)
    assert "; no image of pen" in made.lines[-2]
    assert made.info.left_out["image of a folder that the mapping does not name"] == 1
    assert made.info.left_out["macOS resource file"] == made.info.left_out[".txt file"] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "objectnet_to_imagenet_1k.json",
            {"Pen": "ballpoint"},
            "names the class 'ballpoint', which is not the name of one class",
        ),
        (
            "objectnet_to_imagenet_1k.json",
            {"Pen": "crane"},
            "names the class 'crane', which is not the name of one class",
        ),
        ("objectnet_to_imagenet_1k.json", {"Pen": 3}, "names the class '3'"),
        ("objectnet_to_imagenet_1k.json", {"Pencil": "mitten"}, "has no folder for 'Pencil' of objectnet_to_imagenet"),
        ("folder_to_objectnet_label.json", [], "is no JSON object"),
        (
            "folder_to_objectnet_label.json",
            None,
            "folder_to_objectnet_label.json is missing: download it, and put it there",
        ),
        ("pytorch_to_imagenet_2012_id.json", {"0": 70}, "does not give each class a line of imagenet_to_label_2012_v2"),
        ("pytorch_to_imagenet_2012_id.json", {"1": 0}, "does not give each class a line"),
        ("pytorch_to_imagenet_2012_id.json", None, "is missing"),
        ("imagenet_to_label_2012_v2", None, "is missing"),
    ],
)
def test_damaged_mappings_are_refused(make, objectnet, name, content, message):
    (objectnet / "mappings" / name).unlink()
    if content is not None:
        (objectnet / "mappings" / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        make(objectnet)


def test_nothing_can_be_trained_on_objectnet(make, objectnet):
    made = make(objectnet)
    message = _refused(lambda: find_shards(str(made.folder), "train"))
    assert message.endswith("which has images to evaluate on only: name another folder")


def test_a_set_that_is_only_evaluated_on_can_be_made_again_and_be_an_eval_source(make, objectnet, tmp_path, photo):
    made = make(objectnet)
    again = make(made.folder, samples_per_shard=2)
    assert again.info.train.samples == 0 and len(again.info.eval.shards) == 2
    labels = sorted(json.loads(s["json"])["labels"] for s in _samples(again.folder, "eval"))
    assert labels == [[2], [5, 3], [5, 3], [6]] and again.info.classes == made.info.classes
    _write(tmp_path / "train", {f"{name}/1.jpg": photo(number) for number, name in enumerate(made.info.classes)})
    joined = make(tmp_path / "train", eval_source=str(made.folder), classes=_classes(tmp_path, made.info.classes))
    assert joined.info.train.samples == 7 and joined.info.eval.samples == 4


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_zip_archive_is_to_be_unpacked_first(make, tmp_path, encrypted):
    path = tmp_path / "objectnet-1.0.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("objectnet-1.0/images/pen/a.png", b"x")
    if encrypted:
        content = path.read_bytes().replace(b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0")
        assert content != path.read_bytes()
        path.write_bytes(content)
    password = "-P objectnetisatestset " if encrypted else ""
    message = _refused(lambda: make(path))
    assert f"unpack it with `unzip {password}{path} -d DIR`" in message and "such as DIR/objectnet-1.0" in message
    path.write_bytes(path.read_bytes()[:-9])
    assert "is damaged" in _refused(lambda: make(path))


# ---- ImageNet's validation images, whose ReaL labels are a list in the order of their numbers


def _validation(folder: Path, photo, count: int = 11) -> list[str]:
    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, count + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for number, name in reversed(list(enumerate(names))):
            info = tarfile.TarInfo(f"{name}.JPEG")
            info.size = len(photo(number))
            tar.addfile(info, io.BytesIO(photo(number)))
    rows = [(1, "n003", "c"), (2, "n001", "a"), (3, "n002", "b"), (4, "n004", "d"), (1001, "n000", "a group")]
    synsets = np.array(rows, dtype=[("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O")]).reshape(-1, 1)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{number % 3 + 1}\n" for number in range(count)).encode()
    data = "ILSVRC2012_devkit_t12/data"
    files = {f"{data}/meta.mat": meta.getvalue(), f"{data}/ILSVRC2012_validation_ground_truth.txt": truth}
    _pack(folder / "ILSVRC2012_devkit_t12.tar.gz", files)
    return names


def test_the_validation_tar_alone_is_evaluated_on_in_the_order_of_its_numbers(make, tmp_path, photo):
    names = _validation(tmp_path / "imagenet", photo)
    made = make(tmp_path / "imagenet", seed=3)
    assert made.info.classes == ["n001", "n002", "n003", "n004"], "all of the devkit, and no group"
    assert list(made.eval) == names, "so that a list of other labels fits"
    assert list(made.eval.values()) == [["n003", "n001", "n002"][number % 3] for number in range(11)]
    assert made.info.train.samples == 0 and "ImageNet's validation tar" in made.lines[-2]
    again = make(made.folder, seed=4)
    assert [name.partition("_")[2] for name in again.eval] == names, "also when they are packed again"


@pytest.mark.parametrize("layout", ["tars", "folders", "kaggle"])
def test_validation_images_keep_their_order_in_every_layout(make, tmp_path, photo, layout):
    names = _validation(tmp_path / "imagenet", photo)
    wnids = [["n003", "n001", "n002"][number % 3] for number in range(11)]
    train = {wnid: {f"{wnid}_{n}.JPEG": photo(100 + n) for n in range(3)} for wnid in set(wnids)}
    source = tmp_path / ("imagenet" if layout == "tars" else layout)
    if layout == "tars":
        with tarfile.open(source / "ILSVRC2012_img_train.tar", "w") as tar:
            for wnid, images in train.items():
                _pack_plain(tar, f"{wnid}.tar", images)
    else:
        _write(source / "train", {f"{wnid}/{name}": image for wnid in train for name, image in train[wnid].items()})
        below = {name: f"{wnid}/" if layout == "folders" else "" for name, wnid in zip(names, wnids, strict=True)}
        _write(source / "val", {f"{below[name]}{name}.JPEG": photo(number) for number, name in enumerate(names)})
        rows = [f"{name},{wnid} 1 2 3 4\n" for name, wnid in zip(names, wnids, strict=True)]
        _write(source, {"LOC_val_solution.csv": ("ImageId,PredictionString\n" + "".join(rows)).encode()})
    made = make(source, seed=5)
    assert made.eval == dict(zip(names, wnids, strict=True)) and list(made.eval) == names
    assert len(made.train) == 9


REAL = [[3], [1, 0], [], [2], [0], [3, 1, 2], [0], [], [1], [2], [0]]


@pytest.mark.parametrize("devkit", [True, False])
def test_real_labels_of_the_validation_images(make, tmp_path, photo, devkit):
    names = _validation(tmp_path / "imagenet", photo)
    if not devkit:
        (tmp_path / "imagenet" / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    (tmp_path / "real.json").write_text(json.dumps(REAL))
    made = make(tmp_path / "imagenet", labels=str(tmp_path / "real.json"))
    labels = {_name(s): json.loads(s["json"])["labels"] for s in _samples(made.folder, "eval")}
    assert list(labels.items()) == [(name, label) for name, label in zip(names, REAL, strict=True) if label]
    assert made.info.classes == (["n001", "n002", "n003", "n004"] if devkit else ["0", "1", "2", "3"])
    assert made.info.left_out == {"image without a label": 2}
    assert (
        "ImageNet's validation tar; a tar of images with up to 3 labels each: 9 images to evaluate on" in made.lines[-2]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(REAL[:-1]), "real.json has 10 labels for the 11 images of"),
        (
            json.dumps([*REAL[:-1], [4]]),
            "has the label '4', which is neither one of the 4 class names nor an index below",
        ),
        (json.dumps([*REAL[:-1], 0]), "is no list with a list of class indices for each image"),
        (json.dumps([*REAL[:-1], [True]]), "is no list with a list of class indices"),
        (json.dumps([*REAL[:-1], [-1]]), "is no list with a list of class indices"),
        (json.dumps({"1": [0]}), "is no list with a list of class indices"),
        (json.dumps(REAL)[:-1], "the file of labels .*real.json cannot be read"),
        ("[" * 100_000, "the file of labels .*real.json cannot be read"),
        ("\ud800", "the file of labels .*real.json cannot be read"),
    ],
)
def test_real_labels_that_do_not_fit_are_refused(make, tmp_path, photo, content, message):
    _validation(tmp_path / "imagenet", photo)
    (tmp_path / "real.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=message):
        make(tmp_path / "imagenet", labels=str(tmp_path / "real.json"))


def test_labels_for_what_has_its_own_are_refused(make, tmp_path, packed_pets, photo):
    (tmp_path / "real.json").write_text(json.dumps(REAL))
    message = _refused(lambda: make(packed_pets, labels=str(tmp_path / "real.json")))
    assert "is pets, which has labels of its own: leave out --labels" in message
    _write(tmp_path / "kaggle", {"train/n001/1.JPEG": photo(1), "val/ILSVRC2012_val_00000001.JPEG": photo(2)})
    message = _refused(lambda: make(tmp_path / "kaggle", labels=str(tmp_path / "real.json")))
    assert "--labels names the labels of ILSVRC2012_img_val.tar, which is not in" in message


def _pack_plain(tar: tarfile.TarFile, name: str, files: dict[str, bytes]) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as packed:
        for file, content in files.items():
            info = tarfile.TarInfo(file)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    info = tarfile.TarInfo(name)
    info.size = len(inner.getvalue())
    tar.addfile(info, io.BytesIO(inner.getvalue()))


# ---- lists of the images of each split, as of VTAB-1k

ROWS = {"train800": [0, 2, 1, 0], "val200": [1, 2], "test": [2, 0, 3]}  # labels


@pytest.fixture
def vtab(tmp_path, photo) -> Path:
    folder = tmp_path / "vtab-1k" / "cifar"
    for part, labels in ROWS.items():
        lines = [f"images/{part}/{part} {number}.jpg {label}" for number, label in enumerate(labels)]
        _write(folder, {f"{part}.txt": "\n".join(lines).encode()})
        _write(folder, {line.rpartition(" ")[0]: photo(len(line) + number) for number, line in enumerate(lines)})
    both = (folder / "train800.txt").read_bytes() + b"\n" + (folder / "val200.txt").read_bytes() + b"\n"
    _write(folder, {"train800val200.txt": both})
    return folder


@pytest.mark.parametrize(
    ("left_out", "train", "evaluation", "unused"),
    [
        ([], ["train800", "val200"], "test", {"row of train800.txt": 4, "row of val200.txt": 2}),
        (["test.txt"], ["train800"], "val200", {"row of train800val200.txt": 6, "row of test.txt": 3}),
        (
            ["train800val200.txt", "val200.txt"],
            ["train800"],
            "test",
            {"row of train800val200.txt": 6, "row of val200.txt": 2},
        ),
    ],
)
def test_lists_of_splits(make, vtab, left_out, train, evaluation, unused):
    made = make(vtab, leave_out=left_out)
    assert sorted(made.train.values()) == sorted(str(label) for part in train for label in ROWS[part])
    assert sorted(made.eval.values()) == sorted(map(str, ROWS[evaluation]))
    assert made.info.left_out == unused
    name = "train800val200.txt" if len(train) == 2 else "train800.txt"
    assert f": lists of images, {name} (train) and {evaluation}.txt (eval): " in made.lines[-2]
    assert "labels are class indices, 0 to " in made.lines[-2]


def test_one_list_of_paths_and_labels(make, vtab):
    made = make(vtab / "train800val200.txt", eval_source=str(vtab / "test.txt"), classes=_classes(vtab, "abcd"))
    assert sorted(made.train.values()) == ["a", "a", "b", "b", "c", "c"] and sorted(made.eval.values()) == [
        "a",
        "c",
        "d",
    ]
    (vtab / "test.txt").write_text("images/test/test 0.jpg 2\nimages/test/test 1.jpg\n")
    message = _refused(lambda: make(vtab / "test.txt", eval_fraction=0))
    assert "line 2" in message and "is not the path of an image and a label" in message
    assert make(vtab / "test.txt", max_failed=0.5, eval_fraction=0).info.failed == 1


def _classes(folder: Path, names: Iterable[str]) -> Path:
    (folder / "names").write_text("\n".join(names))
    return folder / "names"


def test_lists_that_could_mean_several_things_are_refused(make, vtab, photo):
    assert f"make each by itself, as `fastvit data make {vtab} " in _refused(lambda: make(vtab.parent))
    message = _refused(lambda: make(vtab, leave_out=["train800*"], format="split-lists"))
    assert "no list of images to train on, but test.txt, val200.txt: add one, or name one list" in message
    assert f"`fastvit data make {vtab}/test.txt --out" in message
    _write(vtab, {"val200.txt": (vtab / "val200.txt").read_bytes() + b"\nimages/train800/train800 0.jpg 0\n"})
    message = _refused(lambda: make(vtab, leave_out=["test.txt"]))
    assert "is in train800.txt and in val200.txt of" in message and "--leave-out val200.txt" in message
    _write(vtab, {"val.txt": (vtab / "val200.txt").read_bytes()})
    message = _refused(lambda: make(vtab))
    assert "--leave-out val200.txt --out" in message and "--leave-out val.txt --out" in message
    _write(vtab, {"train/ant/1.jpg": photo(1), "train/bee/1.jpg": photo(2)})
    message = _refused(lambda: make(vtab))
    assert "holds lists of images and class folders, as train may be: choose with" in message
    assert "--format split-lists" in message and "--format folder" in message


# ---- what could be two data sets


def test_two_data_sets_in_one_folder_are_refused_with_a_command_for_each(make, packed_pets, flowers):
    for path in flowers.iterdir():
        shutil.copy(path, packed_pets)
    message = _refused(lambda: make(packed_pets))
    assert "holds Oxford-IIIT Pets and Flowers-102: choose with" in message
    assert f"`fastvit data make {packed_pets} --format pets --out" in message
    assert make(packed_pets, format="pets").train == PETS_TRAIN
    assert make(packed_pets, format="flowers").train == _of("trnid", "valid")


def test_class_folders_beside_a_data_set_are_refused_with_a_command_for_each(make, flowers, photo):
    _write(flowers, {"rose/1.jpg": photo(1), "lily/1.jpg": photo(2)})
    message = _refused(lambda: make(flowers))
    assert "holds Flowers-102 and class folders, as lily may be" in message
    assert "--format flowers" in message and "--format folder" in message
    assert make(flowers, format="folder", eval_fraction=0).info.classes == ["lily", "rose"]
