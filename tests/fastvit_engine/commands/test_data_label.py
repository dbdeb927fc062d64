"""`fastvit data label` with a model."""

import numpy as np
import pytest
from PIL import Image

from fastvit_engine.data.build.label import label_shards
from fastvit_engine.data.shards.archive import read_shard
from fastvit_engine.data.shards.names import read_info
from fastvit_engine.data.shards.soft_labels import MOST_IN_A_BLOCK, SOFT_MEMBER, parse_soft_label
from tests.fastvit_engine.commands.conftest import NAMES


@pytest.fixture
def more(tmp_path, photo, write_tar):
    """A folder of images that have no labels."""
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more" / "0.tar", [(f"{number}.jpg", photo(number)) for number in range(5)])
    return tmp_path / "more"


def test_labels_are_what_predict_says(fastvit, model_file, more, tmp_path, photo):
    out = tmp_path / "out"
    code, printed, errors = fastvit("data", "label", model_file, "--data", more, "--out", out, "--batch-size", 2)
    assert code == 0 and errors == "" and printed.startswith(f"{out}: 5 train samples in 1 shard, of ")
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(photo(number))
    photos = [tmp_path / f"{number}.jpg" for number in range(5)]
    _, predicted, _ = fastvit("predict", model_file, *photos, "--top", 10, "--json", "--batch-size", 2)
    for sample, image in zip(read_shard(str(out / "train-000000.tar")), predicted["images"], strict=True):
        soft = parse_soft_label(sample[SOFT_MEMBER])
        assert soft.classes.tolist() == [entry["class"] for entry in image["classes"]]
        assert soft.probabilities.tolist() == pytest.approx([entry["probability"] for entry in image["classes"]])
        assert sample["cls"] == str(soft.classes[0]).encode()
    info = read_info(out)
    assert info.classes == NAMES and info.teacher.model == str(model_file)
    assert fastvit("data", "label", model_file, "--data", more, "--out", out)[1].endswith("labelled: 5 train samples\n")
    code, _, errors = fastvit("data", "label", model_file, "--data", more, "--out", out, "--top", 3)
    assert code == 2 and "was made with --top 10, not with --top 3" in errors
    code, _, errors = fastvit("evaluate", model_file, "--data", out / "train-000000.tar", "--json")
    assert code == 0 and f"are what {model_file} takes the images for, not the truth" in errors


def test_a_student_of_another_numbering_is_refused(fastvit, model_file, write_model, more, tmp_path):
    out = tmp_path / "out"
    named = write_model(1, [*reversed(NAMES)])
    assert fastvit("data", "label", model_file, "--data", more, "--out", out)[0] == 0
    words = ["data", "label", named, "--data", out, "--out", tmp_path / "again"]
    code, _, errors = fastvit(*words)
    assert code == 2 and "class 0 is 'nine' in the model and 'zero' in the data: the teacher's take their" in errors
    assert fastvit(*words, "--ignore-names")[0] == 0 and read_info(tmp_path / "again").classes == NAMES[::-1]


def test_a_teacher_without_names_takes_those_of_the_data_if_there_are_as_many(
    fastvit, model_file, write_model, more, tmp_path
):
    nameless = write_model(2, None)
    assert fastvit("data", "label", model_file, "--data", more, "--out", tmp_path / "named")[0] == 0
    assert fastvit("data", "label", nameless, "--data", tmp_path / "named", "--out", tmp_path / "a")[0] == 0
    assert fastvit("data", "label", nameless, "--data", more, "--out", tmp_path / "b")[0] == 0
    assert read_info(tmp_path / "a").classes == NAMES and read_info(tmp_path / "b").classes == list("0123456789")


def test_a_model_without_classes_labels_nothing(fastvit, write_model, more, tmp_path):
    code, _, errors = fastvit("data", "label", write_model(3, ["one"], num_classes=1), "--data", more, "--out", "out")
    assert code == 2 and "has 1 class: name a model that tells classes apart" in errors


def test_sheets_show_probabilities(fastvit, model_file, more, tmp_path):
    out = tmp_path / "out"
    fastvit("data", "label", model_file, "--data", more, "--out", out)
    code, printed, _ = fastvit("data", "stats", out, "--sheet", tmp_path / "sheet.png", "--workers", 1)
    assert code == 0 and "5 with soft labels: on average the most probable class has " in printed
    assert np.asarray(Image.open(tmp_path / "sheet.png")).shape[2] == 3
    assert fastvit("data", "verify", out, "--workers", 1)[0] == 0


def test_the_default_of_top_fills_a_block():
    import inspect

    from fastvit_engine.commands.data.label import _TOP

    assert inspect.signature(label_shards).parameters["top"].default == _TOP == MOST_IN_A_BLOCK
