"""A CSV, TSV or JSONL list of image files or URLs with their labels."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastvit_engine.data.build.sources.columns import LABEL_COLUMNS, PATH_COLUMNS, NoColumn, image_column, label_column
from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.build.sources.label_column import is_missing, read_cell
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder
from fastvit_engine.data.build.sources.reading import is_url
from fastvit_engine.errors import UserError
from fastvit_engine.text import open_text

SUFFIXES = (".csv", ".tsv", ".jsonl")
_DELIMITERS = ",;\t"


class Row(NamedTuple):
    """One image of a table."""

    line: int
    image: Any
    label: Any
    fault: str = ""  # why the line cannot be read


def list_table(path: Path, context: Context) -> Listing:
    """One line per image: a path (relative to the list) or an http(s) URL, and one or several labels.

    CSV and TSV have a header line and are separated by commas, semicolons or tabs; several labels are in one field,
    separated by ";" or as a list. JSONL has one object per line, several labels as a list. Lines that cannot be used
    are listed as faulty images. Raises UserError if the columns are not known, or the file is no text.
    """
    builder = ListingBuilder()
    builder.add_file("bytes", path)  # whose faulty lines are named by their numbers
    folder = builder.add_file("path", path.parent.resolve())
    url: int | None = None
    context.progress.start("listing", os.path.getsize(path), "bytes")
    try:
        for line, image, label, fault in (_json_rows if path.suffix == ".jsonl" else _csv_rows)(path, context):
            try:
                labels = [] if fault else read_cell(label, separator=";")[0]
            except ValueError as error:
                fault = str(error)
            if not fault and (not isinstance(image, str) or not image.strip()):
                fault = "has no path or URL of an image"
            if not fault and any(is_missing(label, context.classes or ()) for label in labels):
                fault = "has no label"
            if fault:
                builder.add_faulty(f"line {line}", fault, file=0)
                continue
            builder.multi_label |= len(labels) != 1
            if not is_url(image):
                builder.add(image, labels, file=folder)
                continue
            if url is None:
                url = builder.add_file("url", "")
            builder.add(image, labels, file=url)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(f"the list {path} cannot be read ({error}): save it as UTF-8 text") from error
    return builder.finish(context.classes, str(path))


def _csv_rows(path: Path, context: Context) -> Iterator[Row]:
    delimiter = _delimiter(path, context)
    with open_text(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        names = _header(reader, path)
        image, label = (names.index(name) for name in _columns(names, path, context))
        for fields in reader:
            if any(fields[len(names) :]):
                fault = f"has {len(fields)} fields, but the header has {len(names)}"
                yield Row(reader.line_num, None, None, fault)
            elif fields:
                fields += [""] * (len(names) - len(fields))
                yield Row(reader.line_num, fields[image], fields[label])


def _delimiter(path: Path, context: Context) -> str:
    """The delimiter by which the header has the columns that are needed. Raises UserError if none does."""
    errors: list[tuple[int, NoColumn]] = []
    for delimiter in _DELIMITERS:
        with open_text(path, newline="") as file:
            names = _header(csv.reader(file, delimiter=delimiter), path)
        try:
            _columns(names, path, context)
            return delimiter
        except NoColumn as error:
            errors.append((len(names), error))
    raise max(errors, key=lambda entry: entry[0])[1]


def _header(reader: Iterator[list[str]], path: Path) -> list[str]:
    names = next((fields for fields in reader if fields), None)
    if names is None:
        raise UserError(f"the list {path} is empty: begin it with a line of column names")
    return names


def _columns(names: Sequence[str], path: Path, context: Context) -> tuple[str, str]:
    return (
        image_column(names, PATH_COLUMNS, str(path), context),
        label_column(names, LABEL_COLUMNS, str(path), context),
    )


def _json_rows(path: Path, context: Context) -> Iterator[Row]:
    """The columns are the keys of the first object."""
    columns: tuple[str, str] | None = None
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                yield Row(number, None, None, "is not JSON")
                continue
            if not isinstance(row, dict):
                yield Row(number, None, None, "is not a JSON object")
                continue
            columns = columns or _columns(list(row), path, context)
            yield Row(number, row.get(columns[0]), row.get(columns[1]))
