"""Reads a column of labels, from any source, as class indices or class names."""

import ast
import json
import math
import re
from collections.abc import Collection, Sequence
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import numpy as np

from fastvit_engine.errors import UserError

Order = Literal["index", "numeric", "alphabetical", "given"]  # of classes

MISSING = -1  # in place of a class index
MISSING_TEXTS = frozenset({"", "nan", "NaN", "NAN", "null", "NULL", "None", "NA", "N/A", "#N/A", "<NA>"})
_INTEGER = re.compile(r"(-?(?:0|[1-9][0-9]{0,17}))(?:\.0*)?")
_NUMBER = re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?|-?inf")
_JOINED = re.compile(r"""['"]\s+['"]""")  # NumPy prints ['a' 'b'], which Python reads as one text
_LARGEST_SPARSE = 100_000  # class indices above this are suspect if few of them occur


class Label(NamedTuple):
    """One label as it stands in a source."""

    text: str  # an integral number without a decimal point if it was a number; "" if it is missing
    named: bool = False  # a class name for certain, even if it is a number


class Classes(NamedTuple):
    """What a column of labels was read as."""

    names: list[str]  # in label order
    indices: np.ndarray  # int32, of each distinct label; MISSING if it is none
    order: Order


def read_cell(value: Any, separator: str | None = None) -> tuple[list[Label], bool]:
    """(labels, whether the cell is a list) of one cell; one missing label if it has none, [] for an empty list.

    Text may be a list in JSON or as Python prints it, and is split at `separator`. Raises ValueError for what is
    neither a number nor text.
    """
    if isinstance(value, np.ndarray | tuple):
        value = list(value)
    if isinstance(value, bytes):
        value = _decode(value)
    if isinstance(value, str):
        value = _split(value.strip(), separator)
    if not isinstance(value, list):
        return [read_label(value)], False
    return [read_label(entry) for entry in value], True


def read_label(value: Any) -> Label:
    """One label of any scalar type. Raises ValueError if it is none."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = _decode(value)
    if value is None:
        return Label("")
    if isinstance(value, bool):
        return Label(str(value), named=True)
    if isinstance(value, str):
        return Label(value.strip())
    if isinstance(value, int):
        return Label(str(value))
    if isinstance(value, float | Decimal):
        if math.isnan(value):
            return Label("")
        return Label(str(int(value)) if math.isfinite(value) and value == int(value) else str(value))
    raise ValueError(f"has a label of type {type(value).__name__}, which is neither a class index nor a name")


def _decode(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("has a label that is not UTF-8 text") from error


def _split(text: str, separator: str | None) -> Any:
    if text.startswith("[") and text.endswith("]"):
        for parse in (json.loads, ast.literal_eval):
            try:
                if not _JOINED.search(text):
                    return list(parse(text))
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue
        raise ValueError("has a list of labels that is neither JSON nor Python")
    if separator is not None and separator in text:
        parts = [part.strip() for part in text.split(separator) if part.strip()]
        return parts or ""
    return text


def integer(text: str) -> int | None:
    """The number that a text stands for, None if it is no integer: "7" and "7.0" are 7, "07" is a name."""
    match = _INTEGER.fullmatch(text)
    return int(match[1]) if match else None


def resolve(labels: Sequence[Label], classes: list[str] | None, where: str) -> Classes:
    """Decides what the distinct labels of a whole column are.

    Without `classes` (the class names in label order), integers are class indices and anything else is a name. With
    them, a label is one of the names or an index. Raises UserError if it is neither, or if it could be both.
    """
    present = [label for label in labels if not is_missing(label, classes or ())]
    order: Order = "given"
    if classes is None:
        classes, order = _classes_of(present, where)
        index_of = {name: index for index, name in enumerate(classes)}
        by_label = {label: index_of[_name(label) if order == "index" else label.text] for label in present}
    else:
        by_label = _among(present, classes, where)
    return Classes(classes, np.array([by_label.get(label, MISSING) for label in labels], np.int32), order)


def is_missing(label: Label, classes: Collection[str]) -> bool:
    """Whether a label stands for none: null, NaN, empty text and the like, unless a class is called so."""
    return not label.named and label.text in MISSING_TEXTS and label.text not in classes


def _classes_of(present: Sequence[Label], where: str) -> tuple[list[str], Order]:
    """Class names in label order, of labels that nothing else describes."""
    texts = {label.text for label in present}
    unnamed = [label.text for label in present if not label.named]
    numbers = {number for text in unnamed if (number := integer(text)) is not None}
    if numbers and len(unnamed) < len(present):
        raise UserError(f"{where} has numbers and truth values as labels: write all of them as class names")
    if unnamed and all(integer(text) is not None for text in unnamed):
        _check_indices(numbers, where)
        return [str(number) for number in range(max(numbers) + 1)], "index"
    if unnamed and all(_NUMBER.fullmatch(text) for text in unnamed):
        fraction = next(text for text in unnamed if integer(text) is None)
        raise UserError(
            f"{where} has the label {fraction} among numbers, which is no class index: write class indices or class "
            "names, or list all labels in class order in a file given as --classes"
        )
    if all(re.fullmatch("-?[0-9]{1,18}", text) for text in texts):
        return sorted(texts, key=lambda text: (int(text), text)), "numeric"
    return sorted(texts), "alphabetical"


def _check_indices(numbers: Collection[int], where: str) -> None:
    lowest, highest = min(numbers), max(numbers)
    remedy = "list all labels in class order, one per line, in a file given as --classes"
    if lowest < 0:
        raise UserError(
            f"{where} has the label {lowest}, but class indices begin at 0: leave it empty if it means no label, or "
            f"{remedy}"
        )
    if highest >= _LARGEST_SPARSE and highest > 10 * len(numbers):
        raise UserError(
            f"{where} has {len(numbers):,} different labels up to {highest}, which are hardly class indices: {remedy}"
        )


def _among(present: Sequence[Label], classes: list[str], where: str) -> dict[Label, int]:
    """The class index of each label, given all class names."""
    by_name = {name: index for index, name in enumerate(classes)}
    if len(by_name) < len(classes):
        twice = next(name for index, name in enumerate(classes) if by_name[name] != index)
        raise UserError(f"the class names of {where} hold '{twice}' twice: give each class a name of its own")
    _check_kinds(present, classes, by_name, where)
    named = {label.text for label in present if label.named}
    # Folders named 0, 1, 2 ... of which every class has one are indices, too; some numbers alone could be anything.
    are_indices = named.isdisjoint(by_name) and {integer(text) for text in named} == set(range(len(classes)))
    indices: dict[Label, int] = {}
    for label in present:
        number = integer(label.text)
        name = label.text if label.text in by_name else _name(label)
        if name in by_name:
            indices[label] = by_name[name]
        elif number is not None and 0 <= number < len(classes) and (are_indices or not label.named):
            indices[label] = number
        else:
            index = "" if label.named else " nor an index below that"
            raise UserError(
                f"{where} has the label '{label.text[:200]}', which is {'neither ' if index else 'not '}one of the "
                f"{len(classes)} class names{index}: correct the label or the class names"
            )
    return indices


def _name(label: Label) -> str:
    """What a class of that label is called: "7" if the label is the text "7.0"."""
    number = None if label.named else integer(label.text)
    return label.text if number is None else str(number)


def _check_kinds(present: Sequence[Label], classes: list[str], by_name: Collection[str], where: str) -> None:
    """Raises UserError if integers could be names of classes as well as indices of others."""
    numbers = {number for label in present if not label.named and (number := integer(label.text)) is not None}
    names = [name for index, name in enumerate(classes) if integer(name) not in (None, index)]
    if not numbers or not names:
        return
    if all(str(number) in by_name for number in numbers) and not numbers <= set(range(len(classes))):
        return  # names, as not all of them are indices
    name = names[0]
    raise UserError(
        f"{where} has integers as labels, but class {classes.index(name)} is called '{name}', so that {name} could be "
        f"an index or a name: number the classes from 0 in both, or use names that are not numbers"
    )
