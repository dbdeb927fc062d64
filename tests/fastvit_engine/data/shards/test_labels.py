"""The one parser of labels."""

import pytest

from fastvit_engine.data.shards.labels import MAX_LABEL_BYTES, json_field, label_member, label_values, parse_labels


@pytest.mark.parametrize(
    ("key", "member", "path"),
    [("cls", "cls", []), ("json.label", "json", ["label"]), ("json.a.b", "json", ["a", "b"]), ("json", "json", [])],
)
def test_a_key_names_a_member_or_a_field_of_json(key, member, path):
    assert label_member(key) == (member, path)


@pytest.mark.parametrize(
    ("content", "path", "labels"),
    [
        (b"3", [], [3]),
        (b" 007\n", [], [7]),
        (b"-1", [], [-1]),
        (b"\xef\xbb\xbf3", [], [3]),
        (b"[1, 2]", [], [1, 2]),
        (b"\xef\xbb\xbf[5]", [], [5]),
        (b"[]", [], []),
        (b"null", [], []),
        (b'{"label": 4}', ["label"], [4]),
        (b'\xef\xbb\xbf{"label": 4}', ["label"], [4]),
        (b'{"labels": [4, 2]}', ["labels"], [4, 2]),
        (b'{"a": {"b": 1}}', ["a", "b"], [1]),
        (b'{"label": null}', ["label"], []),
        (b'{"a": 1}', ["label"], []),
        (b"[1]", ["label"], []),
    ],
)
def test_class_indices(content, path, labels):
    assert parse_labels(content, path) == labels


@pytest.mark.parametrize(
    ("content", "path"),
    [
        (b"", []),
        (b"cat", []),
        (b"true", []),
        (b"[true]", []),
        (b"1_000", []),
        (b"2.0", []),
        (b"[2.0]", []),
        (b'["1"]', []),
        (b"[[1]]", []),
        (b"1 2", []),
        (b"9223372036854775808", []),
        (b"9" * 5000, []),
        (b"[" * 100_000, []),
        (b"\xff\xfe", []),
        (b'{"label": true}', ["label"]),
        (b'{"label": "3"}', ["label"]),
        (b'{"label": {"a": 1}}', ["label"]),
        (b'{"label": ' + b"[" * 100_000, ["label"]),
        (b'{"label": ' + b"9" * 5000 + b"}", ["label"]),
        (b"not json", ["label"]),
        (b"1" * (MAX_LABEL_BYTES + 1), []),
        (b"NaN", []),
        (b"[NaN]", []),
        (b'{"label": Infinity}', ["label"]),
        (b'{"label": 1e400}', ["label"]),
        (b'{"label": 1, "label": 2}', ["label"]),
        (b'{"a": {"b": 1}, "a": {"b": 1}}', ["a", "b"]),
    ],
)
def test_what_is_no_class_index(content, path):
    with pytest.raises(ValueError):
        parse_labels(content, path)


def test_a_key_that_occurs_twice_matters_only_on_the_way_to_the_label():
    assert parse_labels(b'{"x": 1, "x": 2, "label": 3, "y": {"label": 1, "label": 2}}', ["label"]) == [3]
    with pytest.raises(ValueError, match="the JSON has the key 'label' twice"):
        label_values(b'{"label": 3, "x": 1, "label": 3}', ["label"])


def test_a_class_name_has_a_length():
    assert label_values(b"x" * 10_000, []) == ["x" * 10_000]
    with pytest.raises(ValueError, match="10,001 bytes are too many for a class name"):
        label_values(b"x" * 10_001, [])


def test_names_are_values_too():
    assert label_values(b"n01440764\n", []) == ["n01440764"] and label_values(b"true", []) == ["true"]
    assert label_values(b'{"label": ["cat", 3]}', ["label"]) == ["cat", 3]
    assert label_values("\ufeffkäse".encode(), []) == ["käse"]
    assert json_field(b'{"labels": []}', ["labels"]) == [] and json_field(b"{}", ["labels"]) is None
