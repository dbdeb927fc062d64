"""One parser for labels: whatever type a source keeps them in, they mean the same."""

import json
import re
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvit_engine.data.build.sources.label_column import MISSING, MISSING_TEXTS, Label, integer, read_cell, resolve
from fastvit_engine.data.build.sources.listing import ListingBuilder, describe_classes
from fastvit_engine.errors import UserError


def _read(column, classes=None, *, named=False) -> tuple[list[str], list[int | list[int]], str]:
    """(class names, the index of each value, the order), of a column with one label in each cell."""
    labels = [Label(label.text, named or label.named) for value in column for label in read_cell(value)[0]]
    resolved = resolve(labels, classes, "list.csv")
    return resolved.names, resolved.indices.tolist(), resolved.order


_INTEGER_TYPES = [int, float, str, np.int64, np.int8, np.float32, Decimal, "{}.0".format, " {} ".format, b"%d".__mod__]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.sampled_from(_INTEGER_TYPES)), min_size=1))
def test_integers_are_class_indices_in_whatever_type_they_come(cells):
    numbers = [number for number, _ in cells]
    names, indices, order = _read([kind(number) for number, kind in cells])
    assert indices == numbers and order == "index" and names == [str(n) for n in range(max(numbers) + 1)]


@settings(deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1))
def test_names_are_sorted_and_each_label_is_the_class_of_its_name(texts):
    texts = [text.strip() for text in texts] + ["a name"]
    texts = [text for text in texts if text not in MISSING_TEXTS and not text.startswith("[")]
    names, indices, order = _read(texts)
    assert names == sorted(set(texts)) and [names[index] for index in indices] == texts and order == "alphabetical"


@settings(deadline=None)
@given(st.sets(st.integers(-50, 50000), min_size=1))
def test_names_that_are_numbers_are_in_numeric_order(numbers):
    names, indices, order = _read([str(n) for n in numbers], named=True)
    assert [int(name) for name in names] == sorted(numbers) and order == "numeric"
    assert [int(names[index]) for index in indices] == list(numbers)


@pytest.mark.parametrize(
    "missing", [None, float("nan"), np.float32("nan"), Decimal("nan"), b"", *sorted(MISSING_TEXTS)]
)
@pytest.mark.parametrize("others", [["cat", "ant"], [1, 0]])
def test_missing_labels_are_no_class(missing, others):
    names, indices, _ = _read([others[0], missing, others[1], "  "])
    assert indices == [1, MISSING, 0, MISSING] and names == sorted(map(str, others))


def test_a_class_may_be_called_none_if_the_classes_are_given_or_it_is_a_folder():
    assert _read(["None", "cat", ""], ["None", "cat"])[1] == [0, 1, MISSING]
    assert _read(["None", "cat"], named=True)[:2] == (["None", "cat"], [0, 1])


@pytest.mark.parametrize(
    ("column", "names"),
    [
        (["007", "010", "1"], ["1", "007", "010"]),  # codes
        (["747", "A320"], ["747", "A320"]),
        (["2.5", "v3"], ["2.5", "v3"]),
        ([True, False], ["False", "True"]),
        (["1", "[a"], ["1", "[a"]),
    ],
)
def test_other_columns_hold_names(column, names):
    assert _read(column)[0] == names


@pytest.mark.parametrize(
    ("column", "classes", "message"),
    [
        ([0.5, 1.0], None, "has the label 0.5 among numbers, which is no class index"),
        (["1", "2.5"], None, "has the label 2.5 among numbers"),
        ([1.0, float("inf")], None, "has the label inf among numbers"),
        ([1, -1], None, "has the label -1, but class indices begin at 0: leave it empty if it means no label, or list"),
        ([4, 1234567], None, "has 2 different labels up to 1234567, which are hardly class indices"),
        ([True, 1], None, "numbers and truth values"),
        ([2], ["a", "b"], "has the label '2', which is neither one of the 2 class names nor an index below that"),
        (["c"], ["a", "b"], "has the label 'c'"),
        ([True], ["a", "b"], "has the label 'True', which is not one of the 2 class names"),
        ([0, 1], ["1", "2"], "class 0 is called '1', so that 1 could be an index or a name"),
        (["1"], ["cat", "7", "dog"], "class 1 is called '7'"),
        ([0], ["a", "a"], "hold 'a' twice"),
    ],
)
def test_columns_with_two_readings_or_none_are_refused(column, classes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        _read(column, classes)


@pytest.mark.parametrize("column", [[1, -1], [4, 1234567], [0.5, 1.5]])
def test_the_advice_to_list_them_as_classes_works(column):
    classes = [str(value) for value in column]
    assert _read(column, classes)[:2] == (classes, [0, 1])


@settings(deadline=None)
@given(st.lists(st.sampled_from(["ant", "bee", 0, 1, 1.0, "1", "0.0"]), min_size=1))
def test_with_given_classes_a_label_is_a_name_or_an_index(column):
    expected = [["ant", "bee"].index(v) if v in ("ant", "bee") else int(float(v)) for v in column]
    assert _read(column, ["ant", "bee"])[1] == expected


_LABELS = st.lists(st.sampled_from(["ant", "b e", "it's", "ä", 'say "hi"']), max_size=4)


@settings(deadline=None)
@given(_LABELS, st.sampled_from([json.dumps, repr, list, tuple, np.array]))
def test_lists_in_every_form(labels, form):
    found, several = read_cell(form(labels))
    assert [label.text for label in found] == labels and several


@pytest.mark.parametrize("text", ["[1 2]", "['a' 'b']", "[a, b]", "[" * 10_000 + "]" * 10_000, "[{}]", "[[1]]"])
def test_lists_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="list of labels|has a label of type"):
        read_cell(text)


@pytest.mark.parametrize("value", [b"\xff", [b"\xff"]])
def test_bytes_that_are_no_text(value):
    with pytest.raises(ValueError, match="has a label that is not UTF-8 text"):
        read_cell(value)


def test_texts_are_split_only_where_the_source_says_so():
    assert read_cell("ant; bee;;", ";") == ([Label("ant"), Label("bee")], True)
    assert read_cell("ant; bee") == ([Label("ant; bee")], False)
    assert read_cell(" ; ", ";") == ([Label("")], False)


@settings(deadline=None)
@given(st.text())
def test_only_integers_are_integers(text):
    number = integer(text)
    assert number is None or float(text) == number


def test_an_image_without_its_label_is_faulty_and_others_keep_theirs():
    builder = ListingBuilder()
    builder.add_file("path", "/in")
    for name, labels in (("a", ["x", "y"]), ("b", ["x", "null"]), ("c", []), ("d", ["y"])):
        builder.add(name, labels)
    listing = builder.finish(None, "list")
    assert listing.classes == ["x", "y"] and [listing.labels_of(n) for n in (0, 2, 3)] == [[0, 1], [], [1]]
    assert [listing.files[n].fault for n in listing.file] == ["", "has no label", "", ""]


@pytest.mark.parametrize(
    ("labels", "named", "text"),
    [
        (["2", "0"], False, "labels are class indices, 0 to 2, 1 of them without an image"),
        (["10", "9", "1"], True, "3 class names, which are numbers, in numeric order: 1, 9, 10"),
        (["b", "a\x1b[2J"], False, "2 class names in alphabetical order: 'a\\x1b[2J', b"),
        ([], False, "no labels"),
        (list("hgfedcba"), False, "8 class names in alphabetical order: a, b, c, d, ..., h"),
    ],
)
def test_what_labels_were_taken_for_is_described(labels, named, text):
    builder = ListingBuilder(named=named)
    builder.add_file("path", "/in")
    for label in labels:
        builder.add(label, [label])
    assert describe_classes(builder.finish(None, "list")) == text
