"""Lists of classes that people bring are read as they are meant, or refused."""

import numpy as np
import pytest

from fastvit_engine.errors import UserError
from fastvit_engine.evaluate.class_lists import check_names, match_images, read_classes, read_real, right_outputs

NAMES = ["cat", "dog", "7", "pig", "pig", "hen"]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("0,3, 5", [[0], [3], [5]]),
        ("dog,5", [[1], [5]]),
        ("7", [[2]]),  # a name
    ],
)
def test_classes_on_the_command_line(text, groups):
    assert read_classes(text, NAMES, 6) == groups


@pytest.mark.parametrize(
    ("name", "content", "groups"),
    [
        ("a.txt", "cat\n\n 5 \n", [[0], [5]]),
        ("b.json", '["hen", 0, [1, "7"]]', [[5], [0], [1, 2]]),
    ],
)
def test_classes_in_a_file(tmp_path, name, content, groups):
    (tmp_path / name).write_text(content)
    assert read_classes(str(tmp_path / name), NAMES, 6) == groups


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("6", NAMES, r"has 6, outside of the model's outputs 0\.\.5"),
        ("dgo", NAMES, "has 'dgo', which is no class of the model: did you mean 'dog'"),
        ("dog", None, "the model's file names none, so give numbers"),
        ("pig", NAMES, "has 'pig', which 2 classes are called"),
        ("1,dog", NAMES, "names output 1 twice"),
        (",", NAMES, "has no class"),
        ("gone.txt", NAMES, "gone.txt does not exist"),
        ("-1", NAMES, "has '-1', which is no class"),
    ],
)
def test_other_classes_are_refused(text, names, message):
    with pytest.raises(UserError, match=message):
        read_classes(text, names, 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "not a JSON list"), ("[[]]", "an empty entry"), ("[true]", "has True"), ("[", "not valid JSON"),
     ("[[1.0]]", "has 1.0"), ("[" * 10**5, "not valid JSON")],
)  # fmt: skip
def test_other_files_of_classes_are_refused(tmp_path, content, message):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_classes(str(tmp_path / "c.json"), NAMES, 6)


def test_what_labels_count_is_known_from_the_number_of_classes_or_said():
    groups = [[1], [4], [5]]
    by_list, by_model = right_outputs(groups, 6, 3, None)[0], right_outputs(groups, 6, 6, None)[0]
    assert by_list.of_label.tolist() == [[1], [4], [5]]
    assert by_model.of_label.tolist() == [[-1], [1], [-1], [-1], [4], [5]]
    assert by_list.outputs.tolist() == by_model.outputs.tolist() == [1, 4, 5]
    assert right_outputs(groups, 6, None, "list")[0].of_label.tolist() == by_list.of_label.tolist()
    assert right_outputs([[0, 2], [1]], 3, None, "list")[0].of_label.tolist() == [[0, 2], [1, -1]]
    for data_classes in (None, 4):
        with pytest.raises(UserError, match=r"has 3 entries, the model 6 outputs, and .*: say with --labels list"):
            right_outputs(groups, 6, data_classes, None)
    with pytest.raises(UserError, match="entries of several outputs, which only --labels list can serve"):
        right_outputs([[0, 2], [1]], 3, None, "model")


def test_real_lists_are_checked(tmp_path):
    path = tmp_path / "real.json"
    path.write_text("[[1, 2], [], [5]]")
    assert read_real(path, 6) == [[1, 2], [], [5]]
    for content, message in (
        ("[[6]]", r"has 6 for image 0, which is none of the model's outputs 0\.\.5"),
        ("[[1], [-1]]", "has -1 for image 1"),
        ("[[true]]", "has True for image 0"),
        ("[1]", "not a JSON list of lists"),
        ('{"a": []}', "not a JSON list of lists"),
        ("[[1]", "not valid JSON"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_real(path, 6)
    with pytest.raises(UserError, match="cannot be read"):
        read_real(tmp_path / "gone.json", 6)


def test_lists_belong_to_images_by_position_or_by_the_number_in_imagenets_keys():
    positions = np.array([0, 2, 3])
    assert match_images(4, ["a", "b", "c"], positions, 4).tolist() == [0, 2, 3]
    assert match_images(9, ["a", "b", "c"], positions, None).tolist() == [0, 2, 3]  # the first samples of more
    keys = ["x/ILSVRC2012_val_00000009", "x/ILSVRC2012_val_00000001", "x/ILSVRC2012_val_00000004"]
    assert match_images(50000, keys, positions, 3).tolist() == [8, 0, 3]
    for lists, total in ((5, 4), (3, 4), (3, None)):
        with pytest.raises(UserError, match=f"--real has {lists} lists and --data 4 images"):
            match_images(lists, ["a", "b", "c"], positions, total)
    with pytest.raises(UserError, match="numbers up to 9: give the lists of the whole"):
        match_images(8, keys, positions, 3)


def test_classes_of_model_and_data_must_have_the_same_names():
    for model, data in ((None, NAMES), (NAMES, None), (NAMES, NAMES), (NAMES, NAMES[:3])):
        check_names(model, data)
    for data, message in (
        (["dog", "cat", *NAMES[2:]], "class 0 is 'cat' in the model and 'dog' in the data"),
        ([*NAMES, "cow"], "the model has 6 classes and the data 7"),
    ):
        with pytest.raises(UserError, match=message):
            check_names(NAMES, data)
