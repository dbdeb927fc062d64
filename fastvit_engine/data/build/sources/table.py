"""A CSV, TSV or JSONL list of image files or URLs with their labels."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder
from fastvit_engine.data.build.sources.reading import is_url
from fastvit_engine.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl")
IMAGE_COLUMNS = ("path", "url", "image", "file", "filename", "file_name", "image_path", "image_url")
LABEL_COLUMNS = ("label", "labels", "class", "classes", "class_name", "target", "targets")


def list_table(path: Path, context: Context) -> Listing:
    """One line per image: a path (relative to the list) or an http(s) URL, and one or several labels.

    CSV and TSV have a header line; several labels are in one field, separated by ";" or as a JSON list. JSONL has one
    object per line, several labels as a list. Raises UserError naming the line if something is missing.
    """
    builder = ListingBuilder()
    builder.add_file("path", path.parent.resolve())
    image_column = label_column = ""
    context.progress.start("listing", os.path.getsize(path), "bytes")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = _json_rows(file, path) if path.suffix == ".jsonl" else _csv_rows(file, path)
            for number, row in rows:
                if image_column not in row or label_column not in row:
                    image_column = _column(row, IMAGE_COLUMNS, path, number)
                    label_column = _column(row, (context.labels,) if context.labels else LABEL_COLUMNS, path, number)
                labels = _labels(row[label_column])
                if not isinstance(row[image_column], str) or not row[image_column]:
                    raise UserError(f"line {number} of {path} has no {image_column}: complete it or remove it")
                if labels is None:
                    raise UserError(f"line {number} of {path} has no {label_column}: complete it or remove it")
                builder.multi_label |= len(labels) != 1
                if not is_url(row[image_column]):
                    builder.add(row[image_column], labels, file=0)
                    continue
                if len(builder.files) == 1:
                    builder.add_file("url", "")
                builder.add(row[image_column], labels, file=1)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(f"the list {path} cannot be read ({error}): save it as UTF-8 text") from error
    return builder.finish(context.classes, str(path))


def _csv_rows(file: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", restval="")
    for row in reader:
        yield reader.line_num, row


def _json_rows(file: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also numbers of too many digits
            raise UserError(f"line {number} of {path} is not JSON ({error}): correct it") from error
        if not isinstance(row, dict):
            raise UserError(f"line {number} of {path} is not a JSON object: write one object a line")
        yield number, row


def _column(row: dict[str, Any], names: tuple[str, ...], path: Path, number: int) -> str:
    for name in names:
        if name in row:
            return name
    found = ", ".join(str(name) for name in row)
    raise UserError(f"line {number} of {path} has no {' or '.join(names)}, only {found}: name the columns so")


def _labels(value: Any) -> list[str] | None:
    """None if there are none; a list may be empty."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return [value]  # a class whose name begins so
    if isinstance(value, list):
        return [str(label) for label in value]
    if value is None:
        return None
    return [label.strip() for label in str(value).split(";") if label.strip()] or None
