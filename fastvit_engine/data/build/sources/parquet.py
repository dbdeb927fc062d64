"""Parquet files with encoded images, in the layout of Hugging Face's datasets."""

import json
from pathlib import Path
from typing import Any

from fastvit_engine.data.build.sources.columns import (
    BYTES_COLUMNS,
    LABEL_COLUMNS,
    ROW_LEFT_OUT,
    RowSplits,
    image_column,
    label_column,
    row_splits,
    split_column,
)
from fastvit_engine.data.build.sources.context import Context
from fastvit_engine.data.build.sources.label_column import is_missing, read_cell
from fastvit_engine.data.build.sources.listing import Listing, ListingBuilder
from fastvit_engine.data.shards.remote_path import AnyPath, common_folder, matching_files, names_in
from fastvit_engine.data.shards.splits import Splits
from fastvit_engine.errors import UserError
from fastvit_engine.observe.units import counted

_ROWS = 64  # read at once


def list_parquet(path: AnyPath, context: Context) -> Listing:
    """A Parquet file, or a folder of them: a column of images ({bytes, path} or bytes), and one of labels.

    Labels are class indices or names, or lists of them; the names come from the schema's ClassLabel. A row of a Parquet
    file cannot be read without the thousands around it, so the encoded images are unpacked to the scratch folder first.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet files need pyarrow: pip install 'fastvit-engine[parquet]'") from error
    folder, train, held_out = _files(path, context)
    builder = ListingBuilder()
    names: list[str] | None = None
    try:
        files = {name: pyarrow.parquet.ParquetFile(_opened(folder / name)) for name in [*train, *held_out]}
        splits = _row_splits(files, held_out, path, context)
        context.progress.start("unpacking", sum(file.metadata.num_rows for file in files.values()), "images")
        for file_name, file in files.items():
            builder.held_out = file_name in held_out
            names = _unpack(folder / file_name, file, builder, splits, context) or names
            file.close()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error}): download it again") from error
    column = f" with splits in the column '{context.split_column}'" if splits is not None else ""
    context.describe(f"Parquet, {counted(len(files), 'file')}{column}")
    if len(builder) and not builder.usable:
        fault = next(file.fault for file in builder.files if file.fault)
        raise UserError(f"every row of {path} {fault}: embed the images in the file, and give each row a label")
    return builder.finish(context.classes or names, str(path))


def _files(path: AnyPath, context: Context) -> tuple[AnyPath, list[str], list[str]]:
    """The folder, and the names of the files in it to train and to evaluate on."""
    folder = path
    if path.is_dir() and not list(path.glob("*.parquet")) and (path / "data").is_dir():
        folder = path / "data"
    if path.is_dir():
        names = sorted(file.name for file in folder.glob("*.parquet"))
    elif path.is_file():
        return path.parent, [path.name], []
    else:
        files = matching_files(path)
        folder = common_folder(files)
        names = names_in(folder, files)
        if len(Splits.of(names).named()) < 2:
            return folder, names, []
    splits = context.choose_by_name(names, folder, "Parquet file")
    return folder, splits.train, splits.val


def _opened(path: AnyPath) -> Any:
    """What pyarrow takes: a local path, or a remote file that is read by position."""
    return path if isinstance(path, Path) else path.open()


def _row_splits(files: dict[str, Any], held_out: list[str], path: AnyPath, context: Context) -> RowSplits | None:
    """What a column says of the rows; None if no column does, or the names of the files do.

    Raises UserError if both do, and disagree.
    """
    column = next((found for file in files.values() if (found := split_column(file.schema_arrow.names))), None)
    if column is None:
        return None
    values = {
        name: {_text(value) for value in file.read(columns=[column])[column].unique().to_pylist()}
        for name, file in files.items()
        if column in file.schema_arrow.names
    }
    splits = row_splits(column, set().union(*values.values()), str(path))
    if splits is None:
        return None
    for name, own in values.items():
        wrong = next(
            (value for value in sorted(own - {""}) if (splits.parts[value] != "train") != (name in held_out)), ""
        )
        if held_out and wrong:
            raise UserError(
                f"{path} has rows of the split '{wrong}', by the column '{column}', in the file {name}: move them to a "
                "file that is named so, or remove the column"
            )
    if held_out:
        return None
    if len(values) < len(files):
        name = next(name for name in files if name not in values)
        raise UserError(
            f"{name} in {path} has no column '{column}', which other files have: add it, or remove it there"
        )
    context.split_column = column
    return splits


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _unpack(
    path: AnyPath, file: Any, builder: ListingBuilder, splits: RowSplits | None, context: Context
) -> list[str] | None:
    """Adds the images of one file; returns the class names that its schema has."""
    features = _features(file.schema_arrow)
    image_column, label_column = _columns(path, file.schema_arrow, features, context)
    classes = _class_names(features.get(label_column))
    builder.labels_refer_to(classes)
    raw = context.scratch_file(path, ".images")
    builder.add_file("bytes", raw, shown=path)
    offset = row = 0
    with context.writing(raw) as target:
        part_column = label_column if splits is None else context.split_column
        columns = list(dict.fromkeys([image_column, label_column, part_column]))
        for batch in file.iter_batches(_ROWS, columns=columns, use_threads=False):
            for image, label, part in zip(
                *(batch.column(name).to_pylist() for name in (image_column, label_column, part_column)), strict=True
            ):
                split = _text(part) if splits is not None else ""
                if splits is not None and split:
                    if splits.is_left_out(split):
                        builder.left_out[ROW_LEFT_OUT] += 1
                        row += 1
                        continue
                    builder.held_out = splits.is_held_out(split)
                content: Any = image.get("bytes") if isinstance(image, dict) else image
                name = image.get("path") if isinstance(image, dict) else None
                fault = "" if isinstance(content, bytes) else f"has no image bytes in '{image_column}'"
                try:
                    labels, several = read_cell(None if classes and label == -1 else label)
                except ValueError as error:
                    fault = fault or str(error)
                if not fault and any(is_missing(entry, classes or context.classes or ()) for entry in labels):
                    fault = "has no label"
                if not fault and splits is not None and not split:
                    fault = "has no split"
                if fault:
                    builder.add_faulty(f"row {row}", fault)
                else:
                    builder.multi_label |= several
                    builder.add(f"{path.stem}/{name or row}", labels, offset, len(content))
                    target.write(content)
                    offset += len(content)
                row += 1
            context.progress.update(len(builder))
    return classes


def _features(schema: Any) -> dict[str, Any]:
    """The features that Hugging Face's datasets describe in the schema's metadata, by column."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _columns(path: AnyPath, schema: Any, features: dict[str, Any], context: Context) -> tuple[str, str]:
    """(image column, label column), of those that the features describe or, without such, of the usual names."""
    names = [str(name) for name in schema.names]
    typed = [name for name in names if _is(features.get(name), "Image")]
    usual = [name for name in names if name.lower() in BYTES_COLUMNS and _may_hold_images(schema.field(name).type)]
    image = image_column(names, typed or usual or BYTES_COLUMNS, str(path), context)
    typed = [name for name in names if _class_names(features.get(name))]
    return image, label_column(names, typed or LABEL_COLUMNS, str(path), context)


def _may_hold_images(arrow_type: Any) -> bool:
    from pyarrow import types

    if types.is_struct(arrow_type):
        return any(arrow_type.field(index).name == "bytes" for index in range(arrow_type.num_fields))
    return bool(types.is_binary(arrow_type) or types.is_large_binary(arrow_type))


def _is(feature: Any, kind: str) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == kind


def _class_names(feature: Any) -> list[str] | None:
    """The names of a ClassLabel, or of a list of them in any of the ways it has been written."""
    if isinstance(feature, list) and len(feature) == 1:
        return _class_names(feature[0])
    if not isinstance(feature, dict):
        return None
    if "feature" in feature:
        return _class_names(feature["feature"])
    names = feature.get("names")
    return [str(name) for name in names] if isinstance(names, list) and names else None
