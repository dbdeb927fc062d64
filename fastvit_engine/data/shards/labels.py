"""Class labels in the members of a sample."""

import json
import re
from collections import Counter
from typing import Any

MAX_LABEL_BYTES = 1 << 24  # of a member that holds labels; more is not a label
_LONGEST_NAME = 10_000  # bytes of a label that is text

_INTEGER = re.compile(rb"[+-]?[0-9]{1,19}")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def label_member(label_key: str) -> tuple[str, list[str]]:
    """Splits data.label_key into the member that holds the labels and, within a JSON member, the path to the field.

    "cls" is ("cls", []), "json.label" is ("json", ["label"]).
    """
    member, _, path = label_key.partition(".")
    return (member, path.split(".")) if member == "json" and path else (label_key, [])


def label_values(content: bytes, path: list[str]) -> list[Any]:
    """The labels in a member as they are, whether class indices, names or neither.

    Without a path: the text, or the entries if it is a JSON list. With a path: the JSON value of that field, or its
    entries if it is a list. [] if the value is missing or null. Raises ValueError for JSON that cannot be read, and for
    more than MAX_LABEL_BYTES.
    """
    if not path:
        text = _checked(content).strip()
        if not text.startswith(b"["):
            if len(text) > _LONGEST_NAME:
                raise ValueError(f"{len(text):,} bytes are too many for a class name")
            return [] if text == b"null" else [text.decode("utf-8", "backslashreplace")]
    value = json_field(content, path)
    return value if isinstance(value, list) else [] if value is None else [value]


def json_field(content: bytes, path: list[str]) -> Any:
    """The value at a path of a JSON member, None if it is missing. Raises ValueError as `label_values`."""
    try:
        value: Any = json.loads(_checked(content), object_pairs_hook=_Object)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    for name in path:
        if isinstance(value, _Object) and name in value.repeated:
            raise ValueError(f"the JSON has the key {name!r} twice")
        value = value.get(name) if isinstance(value, dict) else None
    return value


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys occur twice: two labels are none."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated: set[str] = set()
        if len(pairs) > len(self):
            counts = Counter(name for name, _ in pairs)
            self.repeated = {name for name, count in counts.items() if count > 1}


def _checked(content: bytes) -> bytes:
    """A label member without its byte order mark."""
    if len(content) > MAX_LABEL_BYTES:
        raise ValueError(f"{len(content):,} bytes are too many for a label")
    return content.removeprefix(_BYTE_ORDER_MARK)


def parse_labels(content: bytes, path: list[str]) -> list[int]:
    """The class indices in a label member: a number, or a JSON list of numbers, as the whole text or at a field's path.

    [] if the field is missing or null. Raises ValueError if it holds anything else, such as true, 2.0 or a name.
    """
    if not path and _INTEGER.fullmatch(text := _checked(content).strip()):
        values: list[Any] = [int(text)]
    else:
        values = label_values(content, path)
    if not all(type(label) is int and -(2**63) <= label < 2**63 for label in values):
        raise ValueError("not class indices")
    return values
