"""A CSV, TSV, JSONL or text list of image files or URLs with their labels."""

import csv
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TextIO

from fastvit_engine.data.build.sources.columns import (
    LABEL_COLUMNS,
    PATH_COLUMNS,
    ROW_LEFT_OUT,
    NoColumn,
    RowSplits,
    image_column,
    label_column,
    row_splits,
    split_column,
)
from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.build.sources.label_column import is_missing, read_cell
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder, without_repeats
from fastvit_engine.data.shards.image_files import has_image_suffix
from fastvit_engine.data.shards.remote_path import AnyPath, is_remote
from fastvit_engine.errors import UserError
from fastvit_engine.text import open_text

SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")
_DELIMITERS = ",;\t"
_FIRST_ROWS = 1000  # of a JSONL list that tell its columns


class Row(NamedTuple):
    """One image of a table."""

    line: int
    image: Any
    label: Any
    fault: str = ""  # why the line cannot be read
    split: str | None = None  # what the column of splits has; None if there is no such column


def list_table(path: AnyPath, context: Context) -> Listing:
    """One line per image: a path (relative to the list) or a URL, and one or several labels.

    CSV and TSV have a header line and are separated by commas, semicolons or tabs; several labels are in one field,
    separated by ";" or as a list. JSONL has one object per line, several labels as a list. A column "split" says which
    rows are held out. A .txt has a path and a label on each line, and no header. Lines that cannot be used are listed
    as faulty images, and those that repeat an image are left out. Raises UserError if the columns are not known, if the
    file is no text, and as `without_repeats`.
    """
    builder = ListingBuilder()
    rows = RowAdder(builder, path, context)
    context.progress.start("listing", path.stat().st_size, "bytes")
    if path.suffix.lower() == ".txt":
        context.describe("a list of paths and labels")
        for row in text_rows(path):
            rows.add(row)
        return without_repeats(builder.finish(context.classes, str(path)), str(path))
    read = _json_rows if path.suffix.lower() == ".jsonl" else _csv_rows
    try:
        splits = _splits(read(path, context), path, context)
        for row in read(path, context):
            if splits is not None and row.split and not row.fault:
                if splits.is_left_out(row.split):
                    builder.left_out[ROW_LEFT_OUT] += 1
                    continue
                builder.held_out = splits.is_held_out(row.split)
            rows.add(row, "has no split" if splits is not None and not row.split else "")
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(f"the list {path} cannot be read ({error}): save it as UTF-8 text") from error
    return without_repeats(builder.finish(context.classes, str(path)), str(path))


class RowAdder:
    """Adds the rows of one list to a listing."""

    def __init__(self, builder: ListingBuilder, path: AnyPath, context: Context) -> None:
        self._builder, self._classes = builder, context.classes or ()
        self._list = builder.add_file("bytes", path)  # whose faulty lines are named by their numbers
        self._folder = builder.add_file("path", path.parent.resolve())
        self._url: int | None = None

    def add(self, row: Row, other_fault: str = "") -> None:
        """Adds the image of a row, or a faulty one if the row cannot be used; `other_fault`: nothing worse is wrong."""
        fault, labels = row.fault, []
        try:
            labels = [] if fault else read_cell(row.label, separator=";")[0]
        except ValueError as error:
            fault = str(error)
        if not fault and (not isinstance(row.image, str) or not row.image.strip()):
            fault = "has no path or URL of an image"
        if not fault and any(mark in str(cell) for cell in (row.image, row.label) for mark in "\r\n"):
            fault = "has a line break in its path or label"
        if not fault and any(is_missing(label, self._classes) for label in labels):
            fault = "has no label"
        fault = fault or other_fault
        if fault:
            self._builder.add_faulty(f"line {row.line}", fault, file=self._list)
            return
        self._builder.multi_label |= len(labels) != 1
        if not is_remote(row.image):
            self._builder.add(row.image, labels, file=self._folder)
            return
        if self._url is None:
            self._url = self._builder.add_file("url", "")
        self._builder.add(row.image, labels, file=self._url)


def text_rows(path: AnyPath) -> Iterator[Row]:
    """The lines "PATH LABEL" of a text file; the path may have spaces. Raises UserError if it cannot be read."""
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                image, label = ([*line.rsplit(None, 1), "", ""])[:2]
                if label and has_image_suffix(image):
                    yield Row(number, image.strip(), label)
                elif line.strip():
                    yield Row(number, None, None, "is not the path of an image and a label")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"the list {path} cannot be read ({error}): save it as UTF-8 text") from error


def _splits(rows: Iterator[Row], path: AnyPath, context: Context) -> RowSplits | None:
    """What the column of splits says; None if there is none."""
    values: set[str] = set()
    for row in rows:
        if not row.fault:
            if row.split is None:
                return None
            values.add(row.split)
    column = context.split_column
    splits = row_splits(column, values, str(path)) if column is not None else None
    if splits is not None:
        context.describe(f"a list with splits in its column '{column}'")
    return splits


def _csv_rows(path: AnyPath, context: Context) -> Iterator[Row]:
    delimiter = _delimiter(path, context)
    with open_text(path, newline="") as file:
        reader = _rows(file, delimiter, path)
        _, names = next(reader)
        image, label = (names.index(name) for name in _columns(names, path, context))
        context.split_column = split_column(names)
        split = None if context.split_column is None else names.index(context.split_column)
        for line, fields in reader:
            if any(fields[len(names) :]):
                fault = f"has {len(fields)} fields, but the header has {len(names)}"
                yield Row(line, None, None, fault)
            else:
                fields += [""] * (len(names) - len(fields))
                part = None if split is None else fields[split].strip()
                yield Row(line, fields[image], fields[label], split=part)


def _delimiter(path: AnyPath, context: Context) -> str:
    """The delimiter by which the header has the columns that are needed. Raises UserError if none does."""
    errors: list[tuple[int, NoColumn]] = []
    for delimiter in _DELIMITERS:
        with open_text(path, newline="") as file:
            names = next((fields for fields in csv.reader(file, delimiter=delimiter) if fields), None)
        if names is None:
            raise UserError(f"the list {path} is empty: begin it with a line of column names")
        try:
            _columns(names, path, context)
            return delimiter
        except NoColumn as error:
            errors.append((len(names), error))
    raise max(errors, key=lambda entry: entry[0])[1]


def _rows(file: TextIO, delimiter: str, path: AnyPath) -> Iterator[tuple[int, list[str]]]:
    """(last line, fields) of each row that is not empty, the header first.

    Raises UserError for quotation marks that do not pair: all rows up to the next one would be taken for one field.
    """
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    end = 0
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
            end = reader.line_num
    except csv.Error as error:
        raise UserError(
            f"the list {path} cannot be read from line {end + 1} on ({error}): put a field that has quotation marks "
            "into quotation marks, and double those in it"
        ) from error


def _columns(names: Sequence[str], path: AnyPath, context: Context) -> tuple[str, str]:
    return (
        image_column(names, PATH_COLUMNS, str(path), context),
        label_column(names, LABEL_COLUMNS, str(path), context),
    )


def _json_rows(path: AnyPath, context: Context) -> Iterator[Row]:
    """The columns are the keys of the first thousand objects, since one may lack a label."""
    keys: dict[str, None] = {}
    with open_text(path) as file:
        for line in islice(file, _FIRST_ROWS):
            keys |= dict.fromkeys(row if isinstance(row := _parsed(line), dict) else {})
    if not keys:
        raise UserError(f"the list {path} has no JSON object in its first lines: write one per line")
    columns = _columns(list(keys), path, context)
    context.split_column = split_column(list(keys))
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = _parsed(line)
            if not isinstance(row, dict):
                yield Row(number, None, None, "is not JSON" if row is None else "is not a JSON object")
                continue
            split = None if context.split_column is None else _text(row.get(context.split_column))
            yield Row(number, row.get(columns[0]), row.get(columns[1]), split=split)


def _parsed(line: str) -> Any:
    """What a line holds; None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()
